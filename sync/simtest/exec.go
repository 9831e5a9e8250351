package simtest

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/longshore-edge/longshore/proto/longshorepb"
	"github.com/longshore-edge/longshore/sync/account"
	"github.com/longshore-edge/longshore/sync/desired"
	"github.com/longshore-edge/longshore/sync/topic"
)

// Exec carries out one command and returns what happened, line by line. The commands:
//
//	hub NAME                     a cloud hub, its cache up to date
//	edge NAME                    an edge with an empty disk, its agent running
//	clone BOX EDGE               a second installation with EDGE's identity and disk
//	put EDGE KIND/NAME TEXT [N]  Kubernetes has this pod, cm, secret or model for EDGE, of about N bytes
//	del EDGE KIND/NAME           it has it no more
//	restore POS                  the store of Kubernetes is restored to the state after POS changes
//	lag HUB                      the hub's cache stays behind from now on
//	watch HUB [N]                it goes N changes further, or follows again
//	restart HUB                  the hub is killed and started: connections end, its cache is listed anew
//	connect BOX HUB              the edge connects
//	cut BOX                      the connection ends, what was on its way is lost or late
//	crash BOX, power BOX         the agent is killed, or the power cut; it boots again
//	full BOX                     the next write to its disk fails
//	forge BOX                    replayed and damaged heads reach the edge
//	link K=V ...                 delay, rate (bytes/s), lose, repeat, damage (percent) of messages from now on
//	run DURATION                 time passes
//	heal                         all faults end, all edges connect; they must converge
//	show BOX                     what the edge holds
func (w *World) Exec(line string) ([]string, error) {
	w.traced = nil
	f := strings.Fields(line)
	if len(f) == 0 {
		return nil, nil
	}
	if err := w.exec(f[0], f[1:]); err != nil {
		return nil, fmt.Errorf("%s: %w", line, err)
	}
	return w.traced, nil
}

// Failures returns the promises that were broken.
func (w *World) Failures() []error { return w.failures }

func (w *World) exec(cmd string, args []string) error {
	first := strings.Join(args[:min(1, len(args))], "")
	switch cmd {
	case "hub":
		w.hubs = append(w.hubs, &hub{w: w, name: first, pos: w.cluster.newest()})
	case "edge":
		b := &box{w: w, name: first, edge: first, disk: newDisk()}
		b.boot()
		w.boxes = append(w.boxes, b)
	case "put", "del":
		return w.execChange(cmd, args)
	case "restore":
		pos, err := strconv.Atoi(first)
		if err != nil || pos < 0 {
			return fmt.Errorf("no position %q", first)
		}
		w.cluster.restore(min(pos, w.cluster.newest()))
		w.changed()
	case "link":
		return w.execLink(args)
	case "run":
		d, err := time.ParseDuration(first)
		if err != nil {
			return err
		}
		w.run(d)
	case "heal":
		w.heal()
	case "lag", "watch", "restart":
		return w.execHub(cmd, args)
	default:
		return w.execBox(cmd, args)
	}
	return nil
}

func (w *World) execChange(cmd string, args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("needs an edge and an object")
	}
	edge, name := args[0], args[1]
	if cmd == "del" {
		w.cluster.change(edge, func(o map[string]desired.Object) { delete(o, name) })
		w.changed()
		return nil
	}
	text := strings.Join(args[2:min(3, len(args))], "")
	if len(args) > 3 {
		n, err := strconv.Atoi(args[3])
		if err != nil {
			return err
		}
		text += filler(name+text, n)
	}
	o, err := newObject(name, text, edgeKey(edge))
	if err != nil {
		return err
	}
	w.cluster.change(edge, func(objects map[string]desired.Object) { objects[name] = o })
	w.changed()
	return nil
}

// filler is n bytes of text that hardly compress, the same for the same seed.
func filler(seed string, n int) string {
	x := uint64(14695981039346656037)
	for i := range len(seed) {
		x = (x ^ uint64(seed[i])) * 1099511628211
	}
	b := make([]byte, n)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = ' ' + byte(x>>40)%95
	}
	return string(b)
}

func (w *World) execLink(args []string) error {
	for _, a := range args {
		k, v, _ := strings.Cut(a, "=")
		if k == "delay" {
			d, err := time.ParseDuration(v)
			if err != nil {
				return err
			}
			w.link.delay = d
			continue
		}
		n, err := strconv.Atoi(v)
		if err != nil {
			return err
		}
		switch k {
		case "rate":
			w.link.rate = n
		case "lose":
			w.link.lose = float64(n) / 100
		case "repeat":
			w.link.repeat = float64(n) / 100
		case "damage":
			w.link.damage = float64(n) / 100
		default:
			return fmt.Errorf("a link has no %q", k)
		}
	}
	return nil
}

func (w *World) execHub(cmd string, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("needs a hub")
	}
	h := w.hub(args[0])
	if h == nil {
		return fmt.Errorf("no hub %q", args[0])
	}
	switch {
	case cmd == "lag":
		h.lag = true
	case cmd == "restart":
		for _, c := range append([]*conn(nil), h.conns...) {
			c.box.disconnect()
		}
		h.proofs, h.pos = nil, w.cluster.newest()
	case len(args) > 1:
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		h.watch(min(h.pos+n, w.cluster.newest()))
	default:
		h.lag = false
		h.watch(w.cluster.newest())
	}
	return nil
}

func (w *World) execBox(cmd string, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("unknown command, or no edge named")
	}
	if cmd == "clone" {
		of := w.box(args[1])
		if of == nil {
			return fmt.Errorf("no edge %q", args[1])
		}
		b := &box{w: w, name: args[0], edge: of.edge, disk: of.disk.clone()}
		b.boot()
		w.boxes = append(w.boxes, b)
		return nil
	}
	b := w.box(args[0])
	if b == nil {
		return fmt.Errorf("no edge %q", args[0])
	}
	switch cmd {
	case "connect":
		h := w.hub(args[1])
		if h == nil {
			return fmt.Errorf("no hub %q", args[1])
		}
		if b.replica.Status().Superseded {
			return nil // it does not come back by itself
		}
		b.connect(h)
	case "cut":
		b.disconnect()
	case "crash", "power":
		b.down(cmd == "power")
		b.boot()
	case "full":
		b.disk.fail = true
	case "forge":
		b.forge()
	case "show":
		w.show(b)
	default:
		return fmt.Errorf("unknown command")
	}
	return nil
}

func (w *World) hub(name string) *hub {
	for _, h := range w.hubs {
		if h.name == name {
			return h
		}
	}
	return nil
}

func (w *World) box(name string) *box {
	for _, b := range w.boxes {
		if b.name == name {
			return b
		}
	}
	return nil
}

func (w *World) show(b *box) {
	s := b.replica.Status()
	w.trace("%s holds %s, synced=%v target=%s", b.name, w.cluster.name(s.Committed), s.Synced, w.cluster.name(s.Target))
	if l := b.disk.now.list; l != nil {
		for _, e := range l.Entries {
			w.trace("  %s", w.cluster.name(desired.Digest(e.GetDigest())))
		}
	}
	if b.conn != nil {
		w.trace("  %d bytes moved on this connection", b.conn.bytes)
	}
}

// traceMessage tells of a message on its way, in terms of the script.
func (w *World) traceMessage(c *conn, l *lane, m message) {
	from, to := c.box.name, c.hub.name
	if l == &c.down {
		from, to = to, from
	}
	w.trace("%s>%s %s", from, to, w.describe(m))
}

func (w *World) describe(m message) string {
	t, err := topic.Parse(m.topic)
	if err != nil {
		return err.Error()
	}
	if m.subscribe {
		if len(t.Digest) == 0 {
			return "subscribe"
		}
		s := "fetch " + w.cluster.name(desired.Digest(t.Digest))
		if t.Offset > 0 {
			s += fmt.Sprintf(" from %d", t.Offset)
		}
		return s
	}
	switch t.Kind {
	case topic.Hello:
		var h longshorepb.Hello
		_ = proto.Unmarshal(m.payload, &h)
		return fmt.Sprintf("hello session=%d held=%s", h.GetSession(), w.digest(h.GetHeld()))
	case topic.Reported:
		r, _ := account.Decode(m.payload)
		return "reported " + w.digest(r.GetList())
	case topic.Index:
		var s longshorepb.SignedHead
		_ = proto.Unmarshal(m.payload, &s)
		return w.describeHead(&s)
	case topic.Push:
		var p longshorepb.Push
		_ = proto.Unmarshal(m.payload, &p)
		names := make([]string, 0, len(p.GetChunks()))
		for _, c := range p.GetChunks() {
			names = append(names, w.digest(c.GetDigest()))
		}
		return "push " + strings.Join(names, ",")
	case topic.Objects, topic.Models:
		var c longshorepb.Chunk
		_ = proto.Unmarshal(m.payload, &c)
		if c.GetGone() {
			s := "gone " + w.digest(c.GetDigest())
			if c.GetNewest() != nil {
				s += ", newest " + w.describeHead(c.GetNewest())
			}
			return s
		}
		return fmt.Sprintf("chunk %s %d+%d/%d", w.digest(c.GetDigest()), c.GetOffset(), len(c.GetData()), c.GetTotal())
	}
	return m.topic
}

func (w *World) describeHead(s *longshorepb.SignedHead) string {
	var h longshorepb.Head
	_ = proto.Unmarshal(s.GetHead(), &h)
	if h.GetSuperseded() {
		return fmt.Sprintf("head %d superseded", h.GetCounter())
	}
	return fmt.Sprintf("head %d %s", h.GetCounter(), w.digest(h.GetList()))
}

func (w *World) digest(b []byte) string {
	if len(b) != 32 {
		return "nothing"
	}
	return w.cluster.name(desired.Digest(b))
}
