package mirror_test

import (
	"bufio"
	"encoding/json"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/longshore-edge/longshore/cloudhub/internal/mirror"
	"github.com/longshore-edge/longshore/sync/plain"
)

// mosquitto starts mosquitto_sub as an edge; lines are "<retained 0|1> <topic> <payload>".
func mosquitto(t *testing.T, address, edge string, args ...string) (lines chan string) {
	t.Helper()
	if _, err := exec.LookPath("mosquitto_sub"); err != nil {
		t.Fatal("mosquitto_sub is missing: install the Debian package mosquitto-clients")
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "mosquitto_sub", append([]string{
		"-h", host, "-p", port, "-u", edge, "-P", token(edge), "-F", "%r %t %p",
	}, args...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines = make(chan string, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		_ = cmd.Wait()
	})
	return lines
}

// next returns the next line.
func next(t *testing.T, lines chan string) string {
	t.Helper()
	select {
	case l, ok := <-lines:
		if !ok {
			t.Fatal("mosquitto_sub ended")
		}
		return l
	case <-time.After(patience):
		t.Fatal("mosquitto_sub printed nothing")
	}
	return ""
}

const plainRoot = "longshore/v1/nodes/dev-1/plain/"

func plainCache() *mirror.Cache {
	c := newCache("dev-1", "dev-2")
	c.SetPod(pod("dev-1", "web", "web:1"))
	c.SetPod(pod("dev-2", "other", "web:1"))
	c.SetModel(model("bearing", "1.0", nil))
	e := edge("dev-1")
	e.Spec.Plain = true
	m := model("bearing", "1.0", nil)
	m.Spec.EdgeSelector = &metav1.LabelSelector{}
	c.Batch(func(c *mirror.Cache) { c.SetEdge(e); c.SetModel(m) })
	return c
}

// Without it, a device that speaks MQTT and nothing else would not learn what it should hold, or not that it changed.
func TestPlainDeviceSeesItsSpecsAndTheirChanges(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", plainCache(), &source{}, nil)
	lines := mosquitto(t, h.address, "dev-1", "-t", plainRoot+"#")
	var topics []string
	for range 3 {
		l := strings.SplitN(next(t, lines), " ", 3)
		if l[0] != "1" {
			t.Errorf("%s came without the retain flag", l[1])
		}
		topics = append(topics, strings.TrimPrefix(l[1], plainRoot))
	}
	slices.Sort(topics)
	if want := []string{"index", "models/default.bearing", "pods/default.web"}; !slices.Equal(topics, want) {
		t.Fatalf("retained topics %v, want %v", topics, want)
	}
	eventually(t, "a plain device counts as connected", func() bool { return h.source.state("dev-1").Online })

	h.cache.SetPod(pod("dev-1", "web", "web:2"))
	for _, want := range []string{"0 " + plainRoot + "index {", "0 " + plainRoot + "pods/default.web {"} {
		if l := next(t, lines); !strings.HasPrefix(l, want) {
			t.Errorf("after a change came %q, want %s…", l, want)
		}
	}
	h.cache.DeletePod("default", "web", "uid-web")
	var index plain.Index
	l := next(t, lines)
	if err := json.Unmarshal([]byte(strings.TrimPrefix(l, "0 "+plainRoot+"index ")), &index); err != nil || len(index.Pods) != 0 || len(index.Models) != 1 {
		t.Errorf("after a deletion came %q, want an index without pods (%v)", l, err)
	}
	if l := next(t, lines); l != "0 "+plainRoot+"pods/default.web " {
		t.Errorf("after a deletion came %q, want an empty payload on the pod's topic", l)
	}
}

// Without it, filters as every MQTT client uses them would give too little, or other devices' specs.
func TestPlainFilters(t *testing.T) {
	f := newFleet()
	h := f.hub(t, "hub", plainCache(), &source{}, nil)
	for filter, want := range map[string]string{
		"index": "index", "+": "index", "pods/+": "pods/default.web", "+/default.bearing": "models/default.bearing", "models/#": "models/default.bearing",
	} {
		lines := mosquitto(t, h.address, "dev-1", "-C", "1", "-t", plainRoot+filter)
		if l := next(t, lines); !strings.HasPrefix(l, "1 "+plainRoot+want+" {") {
			t.Errorf("%s gave %q, want %s", filter, l, want)
		}
		if l, more := <-lines; more {
			t.Errorf("%s gave also %q", filter, l)
		}
	}
	// A foreign filter is refused: mosquitto_sub ends and says so.
	if l, more := <-mosquitto(t, h.address, "dev-1", "-t", "longshore/v1/nodes/dev-2/plain/#"); more {
		t.Errorf("a foreign filter gave %q", l)
	}
}

// G6: without it, a hub that was killed and started anew would tell devices something else, or nothing.
func TestG6PlainIsTheSameAfterRestart(t *testing.T) {
	f := newFleet()
	read := func() []string {
		h := f.hub(t, "hub", plainCache(), &source{}, nil)
		defer h.stop()
		lines := mosquitto(t, h.address, "dev-1", "-C", "3", "-t", plainRoot+"#")
		all := []string{next(t, lines), next(t, lines), next(t, lines)}
		slices.Sort(all)
		return all
	}
	if before, after := read(), read(); !slices.Equal(before, after) {
		t.Errorf("before %q\nafter %q", before, after)
	}
}
