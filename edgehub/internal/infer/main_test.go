package infer

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	ossignal "os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
)

// TestMain makes the test binary also the worker that tests start, one that misbehaves on demand, and an agent that can be
// killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "--model":
			os.Exit(workerMain())
		case "--agent":
			os.Exit(agentMain(os.Args[2], os.Args[3]))
		}
	}
	goleak.VerifyTestMain(m)
}

// fault is a model file of the test's worker: it says how to misbehave.
type fault struct {
	// Load: "" loads, "fail" exits with LoadFailed, "noengine" with NoEngine, "crash" aborts, "hang" never gets ready, "lie"
	// says it is ready and is not.
	Load string
	// Infer: "" answers the sum of the inputs, "crash" ends the process, "hang" never answers, "slow" waits for File to exist.
	Infer string
	// Grow takes that many bytes after it is ready.
	Grow int64
	// File that Infer waits for.
	File string
	// Pad makes files differ.
	Pad string
}

// flagValue returns a value of the worker's command line.
func flagValue(name string) string {
	for i, a := range os.Args {
		if a == name {
			return os.Args[i+1]
		}
	}
	return ""
}

// workerMain implements the worker's contract with the engine "test".
func workerMain() int {
	file, err := os.ReadFile(flagValue("--model"))
	var f fault
	if err == nil {
		err = json.Unmarshal(file, &f)
	}
	say := func(reason string, err error) int {
		fmt.Printf("{\"reason\":%q,\"message\":%q}\n", reason, err)
		return 3
	}
	if err != nil {
		return say("LoadFailed", err)
	}
	name, version := flagValue("--name"), flagValue("--version")
	l, err := net.Listen("unix", flagValue("--socket"))
	if err != nil {
		return say("LoadFailed", err)
	}
	mux := http.NewServeMux()
	ok := func(w http.ResponseWriter, r *http.Request) { writeJSON(w, 200, map[string]bool{"ok": true}) }
	mux.HandleFunc("GET /v2/health/live", ok)
	ready := ok
	if f.Load == "lie" {
		ready = func(w http.ResponseWriter, r *http.Request) { writeError(w, 503, "not yet") }
	}
	mux.HandleFunc("GET /v2/models/"+name+"/ready", ready)
	meta := oip.Metadata{
		Name: name, Versions: []string{version}, Platform: "test",
		Inputs:  []oip.TensorMetadata{{Name: "x", Datatype: oip.FP32, Shape: []int64{-1}}},
		Outputs: []oip.TensorMetadata{{Name: "sum", Datatype: oip.FP32, Shape: []int64{1}}},
	}
	mux.HandleFunc("GET /v2/models/"+name, func(w http.ResponseWriter, r *http.Request) { writeJSON(w, 200, meta) })
	mux.HandleFunc("POST /v2/models/"+name+"/infer", func(w http.ResponseWriter, r *http.Request) {
		switch f.Infer {
		case "crash":
			fmt.Fprintln(os.Stderr, "the model went wrong")
			os.Exit(134)
		case "hang":
			<-r.Context().Done()
			return
		case "slow":
			for !isFile(f.File) && r.Context().Err() == nil {
				<-time.After(10 * time.Millisecond)
			}
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			writeError(w, 400, err.Error())
			return
		}
		req, err := oip.DecodeRequest(body, r.Header.Get(oip.HeaderLength))
		if err == nil {
			err = meta.Check(req)
		}
		if err != nil {
			writeError(w, 400, err.Error())
			return
		}
		var sum float32
		for _, v := range req.Inputs[0].Float32s() {
			sum += v
		}
		resp := &oip.InferResponse{ModelName: name, ModelVersion: version, ID: req.ID, Outputs: []oip.Tensor{oip.FP32Tensor("sum", []int64{1}, []float32{sum})}}
		answer, header, err := resp.Encode(req)
		if err != nil {
			writeError(w, 500, err.Error())
			return
		}
		if header != "" {
			w.Header().Set(oip.HeaderLength, header)
		}
		_, _ = w.Write(answer)
	})
	go func() { _ = http.Serve(l, mux) }()
	switch f.Load {
	case "fail":
		return say("LoadFailed", fmt.Errorf("this is no model"))
	case "noengine":
		return say("NoEngine", fmt.Errorf("no engine for this"))
	case "crash":
		fmt.Fprintln(os.Stderr, "out of luck")
		return 134
	case "hang":
		select {}
	}
	fmt.Println(`{"ready":true,"engine":"test","engineVersion":"1"}`)
	if f.Grow > 0 {
		memory := bytes.Repeat([]byte{1}, int(f.Grow))
		defer func() { fmt.Fprintln(os.Stderr, len(memory)) }()
	}
	term := make(chan os.Signal, 1)
	ossignal.Notify(term, syscall.SIGTERM)
	gone := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(gone)
	}()
	select {
	case <-term:
	case <-gone:
	}
	return 0
}

// agentMain runs a manager on dir with the spec in a file until it is killed, and prints the worker's process id.
func agentMain(dir, spec string) int {
	m, closeStore, err := openManager(dir, nil, nil)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer closeStore()
	b, err := os.ReadFile(spec)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	model, err := decodeSpec(b)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	go func() {
		for range m.Changed() {
			if pid := workerPid(m, "default/"+model.GetName()); pid != 0 {
				fmt.Println("pid", pid)
			}
		}
	}()
	m.SetDesired(specs(model))
	if err := m.Run(context.Background()); err != nil {
		fmt.Println(err)
	}
	return 0
}

// workerPid of the serving worker; 0 if none is ready.
func workerPid(m *Manager, key string) int {
	if w := servingWorker(m, key); w != nil {
		return w.pid
	}
	return 0
}

func servingWorker(m *Manager, key string) *worker {
	m.mu.Lock()
	s := m.models[key]
	m.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	r := s.serving
	s.mu.Unlock()
	if r == nil {
		return nil
	}
	return r.state().worker
}

// gone reports whether a process ended; a zombie counts.
func gone(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}
