package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/longshore-edge/longshore/cloudhub/internal/api/v1alpha1"
	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
)

const (
	// problemsWaiting bounds the problems that wait to become Events; those beyond are logged alone.
	problemsWaiting = 64
	// problemsKnown bounds what is remembered of told problems, for repeatEvery.
	problemsKnown = 4096
	repeatEvery   = 30 * time.Minute
)

type problem struct {
	ref             mirror.ObjectRef
	reason, message string
}

// problems makes Events.
type problems struct {
	core    kubernetes.Interface
	hub     string
	log     *slog.Logger
	waiting chan problem
}

func newProblems(core kubernetes.Interface, hub string, log *slog.Logger) *problems {
	return &problems{core: core, hub: hub, log: log, waiting: make(chan problem, problemsWaiting)}
}

// add does not block.
func (p *problems) add(ref mirror.ObjectRef, reason, message string) {
	select {
	case p.waiting <- problem{ref, reason, message}:
	default:
		p.log.Warn("An object has a problem, too many others wait to become Events", "kind", ref.Kind, "namespace", ref.Namespace, "name", ref.Name, "reason", reason, "problem", message)
	}
}

// Run makes Events until ctx ends: for one and the same problem not more than one in half an hour.
func (p *problems) Run(ctx context.Context) error {
	told := map[problem]time.Time{}
	for {
		var one problem
		select {
		case one = <-p.waiting:
		case <-ctx.Done():
			return nil
		}
		now := time.Now()
		if at, ok := told[one]; ok && now.Sub(at) < repeatEvery {
			continue
		}
		if len(told) >= problemsKnown {
			clear(told)
		}
		told[one] = now
		if err := p.tell(ctx, one, now); err != nil && ctx.Err() == nil {
			p.log.Warn("Cannot make an Event of a problem", "kind", one.ref.Kind, "namespace", one.ref.Namespace, "name", one.ref.Name, "reason", one.reason, "problem", one.message, "error", err)
		}
	}
}

func (p *problems) tell(ctx context.Context, one problem, now time.Time) error {
	ref := corev1.ObjectReference{Kind: one.ref.Kind, Namespace: one.ref.Namespace, Name: one.ref.Name, UID: one.ref.UID, APIVersion: "v1"}
	if one.ref.Kind == "Edge" || one.ref.Kind == "Model" {
		ref.APIVersion = v1alpha1.GroupVersion.String()
	}
	namespace := one.ref.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault // where Events of cluster-scoped objects are
	}
	// One name per object and problem: several hubs tell it once.
	sum := sha256.Sum256([]byte(string(one.ref.UID) + "\x00" + one.reason + "\x00" + one.message))
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: one.ref.Name + "." + hex.EncodeToString(sum[:8])},
		InvolvedObject: ref,
		Reason:         one.reason, Message: shorten(one.message), Type: corev1.EventTypeWarning,
		Source:         corev1.EventSource{Component: "longshore-cloudhub", Host: p.hub},
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now), Count: 1,
		ReportingController: "longshore.dev/cloudhub", ReportingInstance: p.hub,
	}
	api := p.core.CoreV1().Events(namespace)
	_, err := api.Create(ctx, event, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	known, err := api.Get(ctx, event.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	known.Count, known.LastTimestamp = known.Count+1, metav1.NewTime(now)
	_, err = api.Update(ctx, known, metav1.UpdateOptions{})
	return err
}
