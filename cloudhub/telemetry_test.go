package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/cloudhub/internal/intake"
	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/frame"
)

// hubWithTelemetry runs a hub that has each records of each of two streams of two edges, all of one time.
func hubWithTelemetry(t *testing.T, each int) (api string, want []string) {
	t.Helper()
	dir := t.TempDir()
	cfg := testConfig(dir)
	if err := os.Mkdir(cfg.Manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	h, err := newHub(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		h.close()
	})
	encoder, err := frame.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	for _, edge := range []string{"box-1", "box-2"} {
		session := h.intake.Session(edge, &longshorepb.Hello{}, func() {})
		defer session.Close()
		for _, stream := range []string{"a", "b"} {
			f := frame.Frame{Stream: stream, First: 1, Count: uint32(each), BootID: "boot"}
			for i := range each {
				payload := fmt.Sprintf("%s %s %d", edge, stream, i)
				f.Records = frame.AppendRecord(f.Records, frame.Record{MonoNs: 1, WallNs: 1e18, Payload: []byte(payload)})
				want = append(want, payload)
			}
			raw, err := encoder.Encode(&f)
			if err != nil {
				t.Fatal(err)
			}
			m, err := proto.Marshal(&longshorepb.Telemetry{Epoch: make([]byte, 16), Frames: [][]byte{raw}})
			if err != nil {
				t.Fatal(err)
			}
			if err := session.Receive(m); err != nil {
				t.Fatal(err)
			}
		}
	}
	for deadline := time.Now().Add(30 * time.Second); ; <-time.After(10 * time.Millisecond) {
		sums, _, err := h.intake.Ledger(ctx, intake.Query{})
		if err != nil {
			t.Fatal(err)
		}
		delivered := 0
		for _, s := range sums {
			delivered += int(s.Delivered)
		}
		if delivered == len(want) {
			return "http://" + h.door.Addr().String(), want
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d records are stored", delivered, len(want))
		}
	}
}

// payloads reads what the API or the command answered.
func payloads(t *testing.T, lines io.Reader) (out []string) {
	t.Helper()
	for s := bufio.NewScanner(lines); s.Scan(); {
		var r recordJSON
		if err := json.Unmarshal(s.Bytes(), &r); err != nil || r.Payload == nil {
			t.Fatalf("%s: %v", s.Text(), err)
		}
		out = append(out, *r.Payload)
	}
	return out
}

// Without it, whoever takes telemetry out of the hub would get the oldest thousand records and take them for all.
func TestTelemetryIsWholeOrSaysThatItIsNot(t *testing.T) {
	api, want := hubWithTelemetry(t, 400)
	if out, err := runCommandLine(t, "telemetry", "--api", api); err != nil || !slices.Equal(payloads(t, strings.NewReader(out)), want) {
		t.Errorf("the command gives %d bytes, error %v; want all %d records", len(out), err, len(want))
	}
	if out, err := runCommandLine(t, "telemetry", "--api", api, "--limit", "5"); err != nil || !slices.Equal(payloads(t, strings.NewReader(out)), want[:5]) {
		t.Errorf("--limit 5 gives\n%s, error %v", out, err)
	}
	newest := slices.Concat(want[398:400], want[798:800], want[1198:1200], want[1598:])
	if out, err := runCommandLine(t, "telemetry", "--api", api, "--tail", "2"); err != nil || !slices.Equal(payloads(t, strings.NewReader(out)), newest) {
		t.Errorf("--tail 2 gives\n%s, error %v", out, err)
	}
	if _, err := runCommandLine(t, "telemetry", "--api", api, "--tail", "2", "--limit", "3"); err == nil || !strings.Contains(err.Error(), "no --limit") {
		t.Errorf("--tail with --limit: %v", err)
	}
	for _, limit := range []int{0, 13, 14, 401, 1600, 2000} {
		var got bytes.Buffer
		c := client{}
		if err := c.flags().Set("api", api); err != nil {
			t.Fatal(err)
		}
		err := readRecords(t.Context(), &c, url.Values{}, limit, 7, func(b io.Reader) error { return copyRecords(&got, b) })
		expect := want
		if limit > 0 && limit < len(want) {
			expect = want[:limit]
		}
		if records := payloads(t, &got); err != nil || !slices.Equal(records, expect) {
			t.Errorf("in pages of 7, limit %d: %d records, error %v; want %d", limit, len(records), err, len(expect))
		}
	}
	for query, more := range map[string]string{
		"":                      "box-2/a/00000000000000000000000000000000/200",
		"?limit=1600":           "",
		"?edge=box-2&limit=400": "box-2/a/00000000000000000000000000000000/400",
		"?edge=box-2&stream=a":  "",
		"?edge=box-2&stream=b&to=2001-01-01T00:00:00Z": "",
	} {
		res, err := http.Get(api + "/api/v1/telemetry" + query)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if got := res.Trailer.Get(trailerAfter); err != nil || res.StatusCode != http.StatusOK || got != more {
			t.Errorf("%q: %s, %s %q, error %v; want %q", query, res.Status, trailerAfter, got, err, more)
		}
	}
	for _, after := range []string{"box-1", "box-1/a/00/1", "box-1/a/00000000000000000000000000000000/x", "box-9/a/00000000000000000000000000000000/1"} {
		res, err := http.Get(api + "/api/v1/telemetry?after=" + after)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("after=%s: %s", after, res.Status)
		}
	}
	if _, err := runCommandLine(t, "telemetry", "ledger", "--api", api); err != nil {
		t.Errorf("ledger: %v", err)
	}
}
