package kube

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// object is a pointer to an API object.
type object interface {
	metav1.Object
	runtime.Object
}

// selection says which objects of a resource are meant.
type selection struct {
	client    rest.Interface
	resource  string
	namespace string // empty: all
	fields    fields.Selector
	labels    labels.Selector
}

func (s selection) options(o *metav1.ListOptions) {
	if s.fields != nil {
		o.FieldSelector = s.fields.String()
	}
	if s.labels != nil {
		o.LabelSelector = s.labels.String()
	}
}

// sink is what a feed's changes are made to, one at a time and in the order of the watch. An object that was handed in is
// not changed by anybody any more.
type sink[T object] interface {
	set(T)
	remove(namespace, name string, uid types.UID)
	// batch runs f, a whole replacement, as one change.
	batch(f func())
}

type identity struct {
	namespace, name string
	uid             types.UID
}

func identify(o metav1.Object) identity { return identity{o.GetNamespace(), o.GetName(), o.GetUID()} }

// feed follows a selection with one watch and hands every change to its sink. It keeps of each object only the identity and
// the resourceVersion. It is the store that a client-go Reflector writes into, with no queue in between: what the feed says of
// its position is true of the sink.
type feed[T object] struct {
	what selection
	sink sink[T]
	// restored is called when the store's resourceVersion fell back, as after a restored backup.
	restored func()

	mu       sync.Mutex
	versions map[identity]string
	position string // no older than what the sink holds; empty until synced
	synced   bool
	moved    chan struct{} // closed and replaced whenever something changed
	again    func()        // ends the watch, so that another begins with a list; nil while none runs
}

func newFeed[T object](what selection, to sink[T], restored func()) *feed[T] {
	return &feed[T]{what: what, sink: to, restored: restored, versions: map[identity]string{}, moved: make(chan struct{})}
}

// Run follows the watch until ctx ends.
func (f *feed[T]) Run(ctx context.Context, example T) {
	lw := cache.NewFilteredListWatchFromClient(f.what.client, f.what.resource, f.what.namespace, f.what.options)
	watchFunc := lw.WatchFuncWithContext
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		w, err := watchFunc(ctx, o)
		if err != nil && o.SendInitialEvents != nil && utilnet.IsConnectionRefused(err) {
			// The reflector would sleep over this one whatever its context says.
			return nil, errors.New(err.Error())
		}
		return w, err
	}
	listFunc := lw.ListWithContextFunc
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		if o.ResourceVersion == "0" {
			o.ResourceVersion = "" // an API server's cache may be behind what this hub has seen
		}
		return listFunc(ctx, o)
	}
	for ctx.Err() == nil {
		limited, cancel := context.WithCancel(ctx)
		f.setAgain(cancel)
		cache.NewReflectorWithOptions(lw, example, f, cache.ReflectorOptions{
			Name: f.what.resource,
			// From 0.8 s to 5 s: a hub that cannot watch is of no use, so it is more eager than the usual 30 s.
			Backoff: &wait.Backoff{Duration: 800 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 12, Cap: 5 * time.Second},
		}).RunWithContext(limited)
		cancel()
	}
}

func (f *feed[T]) setAgain(again func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.again = again
}

// relist makes the feed begin anew with a list.
func (f *feed[T]) relist() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.again != nil {
		f.again()
	}
}

// Add, Update, Delete, Replace, Resync and UpdateResourceVersion are called by the Reflector alone, from one goroutine.

func (f *feed[T]) Add(o any) error    { return f.put(o) }
func (f *feed[T]) Update(o any) error { return f.put(o) }
func (f *feed[T]) Resync() error      { return nil }

func (f *feed[T]) put(o any) error {
	t, ok := o.(T)
	if !ok {
		return fmt.Errorf("%T in the watch of %s", o, f.what.resource)
	}
	trim(t)
	id := identify(t)
	f.mu.Lock()
	known := f.versions[id]
	f.mu.Unlock()
	if known != "" && older(t.GetResourceVersion(), known) {
		return nil
	}
	f.sink.set(t)
	f.change(func() { f.versions[id] = t.GetResourceVersion() })
	return nil
}

func (f *feed[T]) Delete(o any) error {
	t, ok := o.(T)
	if !ok {
		return fmt.Errorf("%T in the watch of %s", o, f.what.resource)
	}
	id := identify(t)
	f.sink.remove(id.namespace, id.name, id.uid)
	f.change(func() { delete(f.versions, id) })
	return nil
}

func (f *feed[T]) Replace(list []any, position string) error {
	f.mu.Lock()
	fell := f.position != "" && older(position, f.position)
	gone := make(map[identity]bool, len(f.versions))
	for id := range f.versions {
		gone[id] = true
	}
	f.mu.Unlock()
	if fell {
		f.restored()
		return fmt.Errorf("%s: the store's resourceVersion fell back to %s", f.what.resource, position)
	}
	versions := make(map[identity]string, len(list))
	objects := make([]T, 0, len(list))
	for _, o := range list {
		t, ok := o.(T)
		if !ok {
			return fmt.Errorf("%T in the list of %s", o, f.what.resource)
		}
		trim(t)
		id := identify(t)
		objects, versions[id] = append(objects, t), t.GetResourceVersion()
		delete(gone, id)
	}
	f.sink.batch(func() {
		for id := range gone {
			f.sink.remove(id.namespace, id.name, id.uid)
		}
		for _, t := range objects {
			f.sink.set(t)
		}
	})
	f.change(func() { f.versions, f.position, f.synced = versions, position, true })
	return nil
}

// UpdateResourceVersion tells the position after each event, and with each bookmark.
func (f *feed[T]) UpdateResourceVersion(position string) {
	f.change(func() { f.position = position })
}

func (f *feed[T]) change(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
	close(f.moved)
	f.moved = make(chan struct{})
}

// at returns the feed's position, empty before it is synced.
func (f *feed[T]) at() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.position
}

// wait returns when the feed is as far as holds says, which is called with mu held.
func (f *feed[T]) wait(ctx context.Context, holds func() bool) error {
	for {
		f.mu.Lock()
		ok, moved := holds(), f.moved
		f.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("wait for the watch of %s: %w", f.what.resource, ctx.Err())
		}
	}
}

func (f *feed[T]) waitSynced(ctx context.Context) error {
	return f.wait(ctx, func() bool { return f.synced })
}

// snapshot is a consistent list: what the store held at some moment after it was asked for.
type snapshot[T object] struct {
	objects  []T
	position string
}

// list asks the store itself, past every cache that may be behind.
func list[T object](ctx context.Context, what selection) (snapshot[T], error) {
	var o metav1.ListOptions
	what.options(&o)
	lw := cache.NewFilteredListWatchFromClient(what.client, what.resource, what.namespace, what.options)
	all, err := lw.ListWithContextFunc(ctx, o)
	if err != nil {
		return snapshot[T]{}, fmt.Errorf("list %s: %w", what.resource, err)
	}
	accessor, err := meta.ListAccessor(all)
	if err != nil {
		return snapshot[T]{}, err
	}
	objects, err := items[T](all)
	return snapshot[T]{objects, accessor.GetResourceVersion()}, err
}

// reaches waits until the feed holds at least what the snapshot holds. concerns says which of the feed's objects the
// snapshot is about: one that the snapshot lacks must be gone, or newer.
//
// The feed's position alone would do, but a quiet watch hears of it once a minute only; the objects tell at once.
func (f *feed[T]) reaches(ctx context.Context, s snapshot[T], concerns func(identity) bool) error {
	return f.wait(ctx, func() bool {
		if !f.synced {
			return false
		}
		if !older(f.position, s.position) {
			return true
		}
		listed := make(map[identity]bool, len(s.objects))
		for _, t := range s.objects {
			id := identify(t)
			listed[id] = true
			if held := f.versions[id]; held == "" || older(held, t.GetResourceVersion()) {
				return false
			}
		}
		for id, version := range f.versions {
			if !listed[id] && concerns(id) && !older(s.position, version) {
				return false
			}
		}
		return true
	})
}

// older compares two resourceVersions of one resource. Versions that cannot be compared are never older.
func older(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order < 0
}

// trim drops what nobody reads, before an object is kept, and gives it names of its own: those that were decoded stand in memory
// between all that is dropped, and would keep most of it from being given back.
func trim(o metav1.Object) {
	o.SetManagedFields(nil)
	if a := o.GetAnnotations(); a["kubectl.kubernetes.io/last-applied-configuration"] != "" {
		kept := make(map[string]string, len(a))
		for k, v := range a {
			if !strings.HasPrefix(k, "kubectl.kubernetes.io/last-applied") {
				kept[k] = v
			}
		}
		o.SetAnnotations(kept)
	}
	name, uid, version := o.GetName(), string(o.GetUID()), o.GetResourceVersion()
	all := name + uid + version
	o.SetName(all[:len(name)])
	o.SetUID(types.UID(all[len(name) : len(name)+len(uid)]))
	o.SetResourceVersion(all[len(name)+len(uid):])
	o.SetNamespace(unique.Make(o.GetNamespace()).Value())
	if p, ok := o.(*corev1.Pod); ok {
		p.Spec.NodeName = unique.Make(p.Spec.NodeName).Value()
	}
}

func items[T object](list runtime.Object) ([]T, error) {
	var all []T
	err := meta.EachListItem(list, func(o runtime.Object) error {
		t, ok := o.(T)
		if !ok {
			return fmt.Errorf("%T in a list", o)
		}
		all = append(all, t)
		return nil
	})
	return all, err
}
