package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion of the kinds in this package.
var GroupVersion = schema.GroupVersion{Group: "longshore.dev", Version: "v1alpha1"}

// Edge is one enrolled box or device. Its labels are what Models select on.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=ed
// +kubebuilder:printcolumn:name="Link",type=string,JSONPath=`.status.link`
// +kubebuilder:printcolumn:name="Pods",type=boolean,JSONPath=`.spec.pods`
// +kubebuilder:printcolumn:name="Synced",type=boolean,JSONPath=`.status.synced`
// +kubebuilder:printcolumn:name="Backlog",type=integer,JSONPath=`.status.backlogRecords`
// +kubebuilder:printcolumn:name="Last Contact",type=date,JSONPath=`.status.lastContact`
// +kubebuilder:printcolumn:name="Version",type=string,priority=1,JSONPath=`.status.agentVersion`
// +kubebuilder:printcolumn:name="Hub",type=string,priority=1,JSONPath=`.status.hub`
type Edge struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +optional
	Spec EdgeSpec `json:"spec,omitempty"`
	// +optional
	Status EdgeStatus `json:"status,omitempty"`
}

// EdgeSpec says what an edge is for.
type EdgeSpec struct {
	// Pods makes the edge a Node, so that pods can be scheduled onto it.
	// +optional
	Pods bool `json:"pods,omitempty"`
	// Plain publishes the edge's specs as small retained JSON messages, for devices that speak MQTT and nothing else.
	// +optional
	Plain bool `json:"plain,omitempty"`
}

// EdgeStatus is what the hub knows of an edge. It is written on change, and at most once a minute otherwise.
type EdgeStatus struct {
	// Link is Online, Offline or Superseded.
	// +optional
	// +kubebuilder:validation:Enum=Online;Offline;Superseded
	Link string `json:"link,omitempty"`
	// Hub that holds (or last held) the connection.
	// +optional
	Hub string `json:"hub,omitempty"`
	// Session is the durable session number of that connection.
	// +optional
	Session int64 `json:"session,omitempty"`
	// Sequence of the last report taken into account, within Session.
	// +optional
	Sequence int64 `json:"sequence,omitempty"`
	// Instance is the agent start that owns the session, in hex.
	// +optional
	Instance string `json:"instance,omitempty"`
	// Synced: the edge holds what the cluster says for it.
	// +optional
	Synced bool `json:"synced"`
	// LastContact is when the hub last heard from the edge, within a minute while it is online.
	// +optional
	LastContact *metav1.Time `json:"lastContact,omitempty"`
	// +optional
	AgentVersion string `json:"agentVersion,omitempty"`
	// +optional
	Architecture string `json:"architecture,omitempty"`
	// BacklogRecords the edge holds and the cloud does not have yet, as last reported.
	// +optional
	BacklogRecords int64 `json:"backlogRecords"`
	// +optional
	// +listType=map
	// +listMapKey=namespace
	// +listMapKey=name
	Models []EdgeModelStatus `json:"models,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// EdgeModelStatus is one model on one edge.
type EdgeModelStatus struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// +optional
	DesiredVersion string `json:"desiredVersion,omitempty"`
	// +optional
	ServingVersion string `json:"servingVersion,omitempty"`
	// State is Pending, Downloading, Staged, Serving or Failed.
	// +optional
	// +kubebuilder:validation:Enum=Pending;Downloading;Staged;Serving;Failed
	State string `json:"state,omitempty"`
	// +optional
	Reason string `json:"reason,omitempty"`
	// +optional
	Message string `json:"message,omitempty"`
}

// EdgeList is a list of Edges.
//
// +kubebuilder:object:root=true
type EdgeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Edge `json:"items"`
}

// Model is a model that selected edges serve.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.spec.version`
// +kubebuilder:printcolumn:name="Desired",type=integer,JSONPath=`.status.desired`
// +kubebuilder:printcolumn:name="Serving",type=integer,JSONPath=`.status.serving`
// +kubebuilder:printcolumn:name="Staged",type=integer,JSONPath=`.status.staged`
// +kubebuilder:printcolumn:name="Failed",type=integer,JSONPath=`.status.failed`
// +kubebuilder:printcolumn:name="Offline",type=integer,JSONPath=`.status.offline`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Model struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec ModelSpec `json:"spec"`
	// +optional
	Status ModelStatus `json:"status,omitempty"`
}

// ModelSpec says what to serve and where.
type ModelSpec struct {
	// Version is the name of this version, such as "1.4.0".
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`
	Version string `json:"version"`
	// EdgeSelector selects Edges by their labels; an empty selector selects all, a missing one none.
	// +optional
	EdgeSelector *metav1.LabelSelector `json:"edgeSelector,omitempty"`
	// Variants of one version; an edge takes the first whose requirements it meets.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +listType=map
	// +listMapKey=name
	Variants []ModelVariant `json:"variants"`
	// Bindings serve devices that speak MQTT only.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	Bindings []ModelBinding `json:"bindings,omitempty"`
}

// ModelVariant is one file.
type ModelVariant struct {
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// +kubebuilder:validation:Enum=onnx
	Format string `json:"format"`
	// +optional
	// +kubebuilder:validation:Enum=fp32;fp16;int8
	Precision string      `json:"precision,omitempty"`
	Source    ModelSource `json:"source"`
	// Digest of the file.
	// +kubebuilder:validation:Pattern=`^sha256:[0-9a-f]{64}$`
	Digest string `json:"digest"`
	// SizeBytes of the file.
	// +kubebuilder:validation:Minimum=1
	SizeBytes int64 `json:"sizeBytes"`
	// +optional
	Requires ModelRequirements `json:"requires,omitempty"`
}

// ModelSource says where the hub gets the file, once.
type ModelSource struct {
	// URI: http, https or file (relative file paths are below the hub's model folder).
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="self.startsWith('http://') || self.startsWith('https://') || self.startsWith('file:')",message="uri must begin with http://, https:// or file:"
	URI string `json:"uri"`
}

// ModelRequirements says which edges a variant fits.
type ModelRequirements struct {
	// Memory the worker may use.
	// +optional
	Memory *resource.Quantity `json:"memory,omitempty"`
	// +optional
	// +kubebuilder:validation:Enum=amd64;arm64;arm
	Arch string `json:"arch,omitempty"`
	// +optional
	// +kubebuilder:validation:Enum=onnxruntime;gomlx
	Engine string `json:"engine,omitempty"`
}

// ModelBinding connects MQTT topics of the edge's broker with the model.
//
// +kubebuilder:validation:XValidation:rule="has(self.output) || has(self.stream)",message="a binding needs an output topic or a stream"
type ModelBinding struct {
	// Input is a topic filter on the edge's broker.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('longshore/') && !self.startsWith('$')",message="input must not begin with longshore/ or $"
	Input string `json:"input"`
	// Output is a topic name; "{1}" stands for what the first '+' of input matched, and so on.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.contains('+') && !self.contains('#') && !self.startsWith('longshore/') && !self.startsWith('$')",message="output must be a topic name without + or #, not below longshore/ or $"
	Output string `json:"output,omitempty"`
	// Stream for telemetry.
	// +optional
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`
	Stream string `json:"stream,omitempty"`
}

// ModelStatus counts edges; written at most once a second.
type ModelStatus struct {
	// ObservedVersion is the spec.version the counts are about.
	// +optional
	ObservedVersion string `json:"observedVersion,omitempty"`
	// Desired edges select this model.
	Desired int32 `json:"desired"`
	// Staged have the file, and do not serve it yet.
	Staged int32 `json:"staged"`
	// Serving serve this version.
	Serving int32 `json:"serving"`
	// Failed could not serve this version.
	Failed int32 `json:"failed"`
	// Offline are not connected; they may be counted in the others by what they last reported.
	Offline int32 `json:"offline"`
	// Versions counts edges by the version that serves.
	// +optional
	// +listType=map
	// +listMapKey=version
	Versions []ModelVersionCount `json:"versions,omitempty"`
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ModelVersionCount counts the edges that serve one version.
type ModelVersionCount struct {
	Version string `json:"version"`
	Serving int32  `json:"serving"`
}

// ModelList is a list of Models.
//
// +kubebuilder:object:root=true
type ModelList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Model `json:"items"`
}
