package kube

import (
	"errors"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
)

const protobuf = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON

// clients talk to the API server: one for all reads and writes of core kinds (in protobuf), one for our own kinds (which
// exist as JSON only), and one for Leases alone, so that a burst of statuses never delays what keeps nodes alive.
type clients struct {
	core   kubernetes.Interface
	leases kubernetes.Interface
	edge   rest.Interface
}

// connect reads a kubeconfig, or the account of the pod it runs in if path is empty. It does not talk to the API server.
func connect(path string) (*clients, error) {
	config, err := restConfig(path)
	if err != nil {
		return nil, err
	}
	config.UserAgent = "longshore-cloudhub"
	config.QPS, config.Burst = 100, 200
	config.WarningHandler = rest.NoWarnings{}

	own := rest.CopyConfig(config)
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	own.GroupVersion = &v1alpha1.GroupVersion
	own.APIPath = "/apis"
	own.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()

	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, protobuf
	var c clients
	if c.core, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	if c.leases, err = kubernetes.NewForConfig(rest.CopyConfig(config)); err != nil {
		return nil, err
	}
	if c.edge, err = rest.RESTClientFor(own); err != nil {
		return nil, err
	}
	return &c, nil
}

func restConfig(path string) (*rest.Config, error) {
	if path != "" {
		config, err := clientcmd.BuildConfigFromFlags("", path)
		if err != nil {
			return nil, fmt.Errorf("read kubeconfig %s: %s; name a kubeconfig that kubectl works with", path, firstLine(err))
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("not running in a pod of the cluster: name a kubeconfig with --kubeconfig")
	}
	return config, err
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
