package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"
)

// apiServer speaks to a Kubernetes API server as its administrator, without the rate limits of the usual clients.
type apiServer struct {
	base   string
	client *http.Client
}

func openAPIServer(kubeconfig string) (*apiServer, error) {
	b, err := os.ReadFile(kubeconfig)
	if err != nil {
		return nil, err
	}
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Certificate []byte `json:"client-certificate-data"`
				Key         []byte `json:"client-key-data"`
			}
		}
	}
	if err := yaml.Unmarshal(b, &config); err != nil {
		return nil, fmt.Errorf("%s: %w", kubeconfig, err)
	}
	if len(config.Clusters) != 1 || len(config.Users) != 1 {
		return nil, fmt.Errorf("%s does not name one cluster and one user", kubeconfig)
	}
	own, err := tls.X509KeyPair(config.Users[0].User.Certificate, config.Users[0].User.Key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kubeconfig, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(config.Clusters[0].Cluster.CA) {
		return nil, fmt.Errorf("%s has no certificate of the cluster's authority", kubeconfig)
	}
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{own}},
		ForceAttemptHTTP2: true,
	}
	return &apiServer{config.Clusters[0].Cluster.Server, &http.Client{Transport: transport}}, nil
}

// do sends a request; body is JSON or a patch of that kind, and answer is decoded into, if not nil.
func (a *apiServer) do(ctx context.Context, method, path, contentType string, body []byte, answer any) error {
	res, err := a.open(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	defer res.Close()
	if answer == nil {
		_, err = io.Copy(io.Discard, res)
		return err
	}
	return json.NewDecoder(res).Decode(answer)
}

func (a *apiServer) open(ctx context.Context, method, path, contentType string, body []byte) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	res, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode >= http.StatusBadRequest {
		defer res.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10)) // the status says enough
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, res.Status, text)
	}
	return res.Body, nil
}

const (
	jsonType  = "application/json"
	patchType = "application/strategic-merge-patch+json"
)

func (a *apiServer) create(ctx context.Context, path string, object any) error {
	b, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return a.do(ctx, http.MethodPost, path, jsonType, b, nil)
}

// watchPods calls each for every pod that is there or changes, until it says that it has seen enough. The API server ends
// watches that lag behind a burst; the next one begins with what is there.
func (a *apiServer) watchPods(ctx context.Context, selector string, each func(name, phase string) (enough bool)) error {
	for {
		stream, err := a.open(ctx, http.MethodGet, podsPath+"?watch=1&labelSelector="+selector, jsonType, nil)
		if err != nil {
			return fmt.Errorf("watch pods: %w", err)
		}
		enough := podEvents(stream, each)
		stream.Close()
		if enough {
			return nil
		}
	}
}

// podEvents of one watch, until each has seen enough or the stream ends.
func podEvents(stream io.Reader, each func(name, phase string) (enough bool)) bool {
	events := json.NewDecoder(stream)
	for {
		var event struct {
			Type   string
			Object struct {
				Metadata struct{ Name string }
				Status   struct{ Phase string }
			}
		}
		if err := events.Decode(&event); err != nil || event.Type == "ERROR" {
			return false
		}
		if event.Type != "DELETED" && each(event.Object.Metadata.Name, event.Object.Status.Phase) {
			return true
		}
	}
}

// podWrites counts the writes to pods that the API server has seen: to their status, and others.
func (a *apiServer) podWrites(ctx context.Context) (status, others int, err error) {
	err = a.requests(ctx, func(resource, verb, subresource string, n int) {
		switch {
		case resource != "pods", verb == "GET", verb == "LIST", verb == "WATCH":
		case subresource == "status":
			status += n
		default:
			others += n
		}
	})
	return status, others, err
}

// ofEdges counts the requests that the API server has seen about single edges, their nodes, pods, models and what pods name: no
// lists and watches, and no Leases, whose renewal goes on anyhow.
func (a *apiServer) ofEdges(ctx context.Context) (count int, err error) {
	err = a.requests(ctx, func(resource, verb, _ string, n int) {
		switch resource {
		case "edges", "nodes", "pods", "models", "secrets", "configmaps":
			if verb != "LIST" && verb != "WATCH" {
				count += n
			}
		}
	})
	return count, err
}

// requests calls each for every count of requests in the API server's own metrics.
func (a *apiServer) requests(ctx context.Context, each func(resource, verb, subresource string, n int)) error {
	stream, err := a.open(ctx, http.MethodGet, "/metrics", jsonType, nil)
	if err != nil {
		return err
	}
	defer stream.Close()
	b, err := io.ReadAll(stream)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		labels, ok := strings.CutPrefix(line, "apiserver_request_total{")
		if !ok {
			continue
		}
		labels, value, _ := strings.Cut(labels, "} ")
		n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil {
			return err
		}
		each(label(labels, "resource"), label(labels, "verb"), label(labels, "subresource"), int(n))
	}
	return nil
}

// label returns the value of one label of a metric.
func label(labels, name string) string {
	_, after, _ := strings.Cut(","+labels, ","+name+`="`)
	value, _, _ := strings.Cut(after, `"`)
	return value
}
