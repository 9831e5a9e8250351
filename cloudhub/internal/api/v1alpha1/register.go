package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// AddToScheme registers the kinds of this package, and the meta types every group needs, with a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &Edge{}, &EdgeList{}, &Model{}, &ModelList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
