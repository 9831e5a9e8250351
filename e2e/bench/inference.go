package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/longshore-edge/longshore/e2e/bearing"
	"github.com/longshore-edge/longshore/e2e/bearing/sensor"
)

// inference asks the same model the same question through the edge's HTTP door and at its worker's socket, in turns, one
// request at a time over a connection that stays open.
func inference(ctx context.Context, b *bench) (err error) {
	const rounds, requests = 5, 400
	s, e, err := b.dock(ctx, "inference", 1)
	if err != nil {
		return err
	}
	defer s.close(&err)
	socket, err := workerSocket(e.State())
	if err != nil {
		return err
	}
	dialer := &net.Dialer{}
	direct := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", socket)
	}}}
	door := &http.Client{Transport: &http.Transport{}}
	defer direct.CloseIdleConnections()
	defer door.CloseIdleConnections()
	doorURL, directURL := "http://"+e.HTTP, "http://worker"
	question, err := askWhat(ctx, door, doorURL)
	if err != nil {
		return err
	}
	for _, warm := range []struct {
		c   *http.Client
		url string
	}{{door, doorURL}, {direct, directURL}} {
		if _, err := ask(ctx, warm.c, warm.url, question, requests); err != nil {
			return err
		}
	}
	for range b.runs {
		var atDoor, atWorker []float64
		for range rounds {
			took, err := ask(ctx, door, doorURL, question, requests)
			if err != nil {
				return err
			}
			atDoor = append(atDoor, took...)
			if took, err = ask(ctx, direct, directURL, question, requests); err != nil {
				return err
			}
			atWorker = append(atWorker, took...)
		}
		slices.Sort(atDoor)
		slices.Sort(atWorker)
		p50, own := quantile(atDoor, 0.5), quantile(atWorker, 0.5)
		b.record(figure{Name: "inference-overhead", What: "an inference through the edge's HTTP door takes longer than at the worker's socket, p50", Unit: "µs", Reach: atMost(150)}, p50-own)
		b.record(figure{Name: "inference-door", What: fmt.Sprintf("the inference at the door (%d values as JSON), p50", bearing.Window), Unit: "µs"}, p50)
		b.record(figure{Name: "inference-worker", What: "the inference at the worker's socket, p50", Unit: "µs"}, own)
	}
	return nil
}

const modelPath = "/v2/models/bearing"

// askWhat makes a request for the model out of its metadata and what a sensor measures.
func askWhat(ctx context.Context, c *http.Client, base string) ([]byte, error) {
	b, err := exchange(ctx, c, http.MethodGet, base+modelPath, nil)
	if err != nil {
		return nil, err
	}
	var meta struct {
		Inputs []struct{ Name, Datatype string }
	}
	if err := json.Unmarshal(b, &meta); err != nil {
		return nil, err
	}
	if len(meta.Inputs) != 1 {
		return nil, fmt.Errorf("the model has %d inputs", len(meta.Inputs))
	}
	_, payload, err := sensor.New(1, bearing.Normal).Payload()
	if err != nil {
		return nil, err
	}
	var measured struct{ Values []float32 }
	if err := json.Unmarshal(payload, &measured); err != nil {
		return nil, err
	}
	type tensor struct {
		Name     string    `json:"name"`
		Datatype string    `json:"datatype"`
		Shape    []int     `json:"shape"`
		Data     []float32 `json:"data"`
	}
	return json.Marshal(map[string]any{
		"inputs": []tensor{{meta.Inputs[0].Name, meta.Inputs[0].Datatype, []int{1, len(measured.Values)}, measured.Values}},
	})
}

// ask so many times, and return what each took, in microseconds.
func ask(ctx context.Context, c *http.Client, base string, question []byte, times int) ([]float64, error) {
	took := make([]float64, times)
	for i := range took {
		begin := time.Now()
		if _, err := exchange(ctx, c, http.MethodPost, base+modelPath+"/infer", question); err != nil {
			return nil, err
		}
		took[i] = float64(time.Since(begin).Nanoseconds()) / 1000
	}
	return took, nil
}

func exchange(ctx context.Context, c *http.Client, method, url string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, res.Status, answer)
	}
	return answer, err
}

// workerSocket finds the socket of the one worker whose model file is below an edge's state folder.
func workerSocket(state string) (string, error) {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return "", err
	}
	for _, file := range all {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the process has ended
		}
		args := strings.Split(string(b), "\x00")
		m, s := slices.Index(args, "--model"), slices.Index(args, "--socket")
		if m >= 0 && s >= 0 && strings.HasPrefix(args[m+1], state+"/") {
			return args[s+1], nil
		}
	}
	return "", errors.New("no worker runs for this edge")
}
