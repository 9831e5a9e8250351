package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// modelFile is what the edge serves in these figures.
const modelFile = "bearing-1.onnx"

// modelManifest of the committed model for every edge of the bench; it copies the file into the hub's folder.
func (s *site) modelManifest() (string, error) {
	b, err := os.ReadFile(filepath.Join("e2e", "bearing", modelFile))
	if err != nil {
		return "", fmt.Errorf("%w (run the bench from the top of the repository)", err)
	}
	if err := os.WriteFile(filepath.Join(s.hub.Models(), modelFile), b, 0o644); err != nil {
		return "", err
	}
	return fmt.Sprintf(`apiVersion: longshore.dev/v1alpha1
kind: Model
metadata: {name: bearing, namespace: default}
spec:
  version: "1"
  edgeSelector: {matchLabels: {bench: "true"}}
  variants:
  - name: fp32
    format: onnx
    precision: fp32
    source: {uri: "file:%s"}
    digest: sha256:%x
    sizeBytes: %d
`, modelFile, sha256.Sum256(b), len(b)), nil
}

// dock is a site with one edge that holds so many pods, and serves the model.
func (b *bench) dock(ctx context.Context, name string, pods int) (*site, *box, error) {
	s, err := b.newSite(name)
	if err != nil {
		return nil, nil, err
	}
	e, err := s.startDock(ctx, pods)
	if err != nil {
		s.close(&err)
		return nil, nil, err
	}
	return s, e, nil
}

func (s *site) startDock(ctx context.Context, pods int) (*box, error) {
	model, err := s.modelManifest()
	if err != nil {
		return nil, err
	}
	if err := s.hub.Write("model.yaml", model); err != nil {
		return nil, err
	}
	if err := s.hub.Write("edge.yaml", edgeManifest("dock", pods, "1")); err != nil {
		return nil, err
	}
	if err := s.hub.Start(ctx); err != nil {
		return nil, err
	}
	e, err := s.box(ctx, "dock", "")
	if err != nil {
		return nil, err
	}
	return e, s.synced(ctx, e, pods, 1)
}

// reconnect cuts and restores the link of an edge in sync, and counts every byte above TCP until nothing moves any more.
func reconnect(ctx context.Context, b *bench) (err error) {
	s, e, err := b.dock(ctx, "reconnect", 10)
	if err != nil {
		return err
	}
	defer s.close(&err)
	if _, err := quiet(ctx, e); err != nil {
		return err
	}
	for range b.runs {
		before, payload := e.link.Bytes(), e.link.Payload()
		files := e.files.Bytes()
		if err := e.flap(ctx); err != nil {
			return err
		}
		after, err := quiet(ctx, e)
		if err != nil {
			return err
		}
		b.record(figure{
			Name: "reconnect", What: "reconnect of an edge with 10 pods and a model, nothing changed: bytes both ways, all protocol above TCP included",
			Unit: "bytes", Reach: atMost(1024),
		}, float64(after-before))
		b.record(figure{Name: "reconnect-payload", What: "MQTT payload among them: hello, head, the first report, acknowledgement", Unit: "bytes", Reach: atMost(1024)}, float64(e.link.Payload()-payload))
		b.record(figure{Name: "reconnect-files", What: "bytes at the hub's door for files meanwhile", Unit: "bytes", Reach: atMost(0)}, float64(e.files.Bytes()-files))
	}
	return nil
}

// quiet waits until no byte has moved for longer than an edge pauses between two reports, and returns the count of bytes.
func quiet(ctx context.Context, e *box) (int64, error) {
	const still = 4 * time.Second
	last, since := e.link.Bytes(), time.Now()
	err := poll(ctx, 100*time.Millisecond, func() error {
		if now := e.link.Bytes(); now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) < still {
			return errors.New("the link is not quiet")
		}
		return nil
	})
	return last, err
}

// flap cuts and restores the link, and waits until the edge is in sync in a new session.
func (e *box) flap(ctx context.Context) error {
	st, err := e.Status(ctx)
	if err != nil {
		return err
	}
	e.cut()
	e.restore()
	return poll(ctx, 10*time.Millisecond, func() error {
		now, err := e.Status(ctx)
		if err == nil && (now.Link.Session == st.Link.Session || !now.List.Synced) {
			err = errors.New("not in sync in a new session")
		}
		return err
	})
}

// reconnectRequests counts what the same reconnect costs the API server, with a full edge that is the only one.
func (k *kubeSite) reconnectRequests(ctx context.Context, b *bench) error {
	const name, pods = "dock", 10
	if err := k.api.create(ctx, edgesPath, object{
		"apiVersion": "longshore.dev/v1alpha1", "kind": "Edge", "metadata": object{"name": name}, "spec": object{"pods": true},
	}); err != nil {
		return err
	}
	e, err := k.box(ctx, name, "")
	if err != nil {
		return err
	}
	if err := poll(ctx, 200*time.Millisecond, func() error { return k.nodes(ctx, 1) }); err != nil {
		return err
	}
	for i := range pods {
		if err := k.api.create(ctx, podsPath, kubePod(name, name, i)); err != nil {
			return err
		}
	}
	if err := k.synced(ctx, e, pods, 0); err != nil {
		return err
	}
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	for range b.runs {
		if _, err := quiet(ctx, e); err != nil {
			return err
		}
		before, err := k.api.ofEdges(ctx)
		if err != nil {
			return err
		}
		if err := e.flap(ctx); err != nil {
			return err
		}
		if _, err := quiet(ctx, e); err != nil {
			return err
		}
		after, err := k.api.ofEdges(ctx)
		if err != nil {
			return err
		}
		b.record(figure{Name: "reconnect-requests", What: "requests to the API server because of such a reconnect", Unit: "requests", Reach: atMost(0)}, float64(after-before))
	}
	if err := end(e.Process); err != nil {
		return err
	}
	k.boxes = k.boxes[:len(k.boxes)-1] // the fleet that follows is without it
	for _, path := range []string{podsPath + "?gracePeriodSeconds=0", edgesPath} {
		if err := k.api.do(ctx, http.MethodDelete, path, jsonType, nil, nil); err != nil {
			return err
		}
	}
	return nil
}
