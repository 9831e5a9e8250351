package broker_test

import (
	"bytes"
	"context"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/longshore-edge/longshore/broker"
)

// mosquitto is a client of mosquitto-clients; nobody here wrote it.
type mosquitto struct {
	t    *testing.T
	addr *net.TCPAddr
}

func (m mosquitto) command(program string, args ...string) *exec.Cmd {
	m.t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		m.t.Fatalf("%s is needed: apt-get install mosquitto-clients", program)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	m.t.Cleanup(cancel)
	line := []string{"-oL", program, "-h", m.addr.IP.String(), "-p", strconv.Itoa(m.addr.Port)} // stdbuf: a line at a time
	return exec.CommandContext(ctx, "stdbuf", append(line, args...)...)
}

// publish runs mosquitto_pub, which fails unless its message was acknowledged in full.
func (m mosquitto) publish(args ...string) {
	m.t.Helper()
	if out, err := m.command("mosquitto_pub", args...).CombinedOutput(); err != nil {
		m.t.Fatalf("mosquitto_pub %q: %v\n%s", args, err, out)
	}
}

// mosquittoSub is a running mosquitto_sub.
type mosquittoSub struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  lines
	errs bytes.Buffer
}

// subscribe starts mosquitto_sub with -d and returns when its SUBACK came.
func (m mosquitto) subscribe(args ...string) *mosquittoSub {
	m.t.Helper()
	s := &mosquittoSub{t: m.t, cmd: m.command("mosquitto_sub", append([]string{"-d", "-F", "got %t %p q%q r%r"}, args...)...)}
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.errs
	if err := s.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(s.stop)
	eventually(m.t, "SUBACK for mosquitto_sub", func() bool { return s.out.has("Subscribed (mid") })
	return s
}

func (s *mosquittoSub) stop() {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	}
}

func (s *mosquittoSub) want(line string) {
	s.t.Helper()
	eventually(s.t, line, func() bool { return s.out.has(line + "\n") })
}

func (s *mosquittoSub) count(part string) int {
	s.out.mu.Lock()
	defer s.out.mu.Unlock()
	return strings.Count(s.out.buf.String(), part)
}

func startMosquitto(t *testing.T, cfg broker.Config) (*broker.Broker, mosquitto) {
	b, addr := serve(t, cfg)
	return b, mosquitto{t: t, addr: addr.(*net.TCPAddr)}
}

// Most devices in the field speak MQTT with a library we have never seen; the commonest must work with every QoS and
// both versions.
func TestMosquittoQoS(t *testing.T) {
	_, m := startMosquitto(t, broker.Config{Store: (&disk{}).store})
	for _, version := range []string{"mqttv311", "mqttv5"} {
		for _, qos := range []string{"0", "1", "2"} {
			topic := "m/" + version + qos
			s := m.subscribe("-V", version, "-q", qos, "-t", "m/+")
			m.publish("-V", version, "-q", qos, "-t", topic, "-m", "hello")
			s.want("got " + topic + " hello q" + qos + " r0")
			s.stop()
		}
	}
}

// A display that starts late must show the last value.
func TestMosquittoRetained(t *testing.T) {
	_, m := startMosquitto(t, broker.Config{})
	for _, version := range []string{"mqttv311", "mqttv5"} {
		m.publish("-V", version, "-q", "1", "-r", "-t", "r/kept", "-m", "value")
		m.publish("-V", version, "-q", "1", "-r", "-t", "r/gone", "-m", "value")
		m.publish("-V", version, "-q", "1", "-r", "-t", "r/gone", "-n")
		s := m.subscribe("-V", version, "-q", "1", "-t", "r/#")
		s.want("got r/kept value q1 r1")
		if s.count("r/gone") != 0 {
			t.Error("a cleared value came back")
		}
		s.stop()
	}
}

// G3: what was sent while a device with a persistent session was away must reach it when it is back.
func TestMosquittoPersistentSession(t *testing.T) {
	b, m := startMosquitto(t, broker.Config{})
	for _, version := range []string{"mqttv311", "mqttv5"} {
		args := []string{"-V", version, "-i", "dev-" + version, "-c", "-q", "1", "-t", "p/" + version}
		if version == "mqttv5" {
			args = append(args, "-x", "3600")
		}
		m.subscribe(args...).stop()
		eventually(t, "device away", func() bool { return b.Stats().Connections == 0 })
		for _, payload := range []string{"one", "two", "three"} {
			m.publish("-q", "1", "-t", "p/"+version, "-m", payload)
		}
		s := m.subscribe(args...)
		for _, payload := range []string{"one", "two", "three"} {
			s.want("got p/" + version + " " + payload + " q1 r0")
		}
		s.stop()
	}
}

// A device that loses power must be announced by its will.
func TestMosquittoWill(t *testing.T) {
	_, m := startMosquitto(t, broker.Config{})
	watch := m.subscribe("-q", "1", "-t", "w/#")
	m.subscribe("-t", "any", "--will-topic", "w/dev", "--will-payload", "gone", "--will-qos", "1").stop() // killed
	watch.want("got w/dev gone q1 r0")
}

// G5: a foreign client must be told that it may not.
func TestMosquittoIsRefused(t *testing.T) {
	_, m := startMosquitto(t, broker.Config{Auth: door{access: access{publish: own, subscribe: own}}})
	if out, err := m.command("mosquitto_pub", "-q", "1", "-t", "foreign", "-m", "x").CombinedOutput(); err == nil {
		t.Errorf("publish to a foreign topic succeeded: %s", out)
	}
	if out, err := m.command("mosquitto_sub", "-t", "foreign").CombinedOutput(); !bytes.Contains(out, []byte("denied")) {
		t.Errorf("subscribe to a foreign topic: %v\n%s", err, out)
	}
	if out, err := m.command("mosquitto_pub", "-u", "evil", "-P", "x", "-t", "own/x", "-m", "x").CombinedOutput(); err == nil || !strings.Contains(string(out), "not authori") {
		t.Errorf("bad credential: %v\n%s", err, out)
	}
}
