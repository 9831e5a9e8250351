package fault

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/longshore-edge/longshore/e2e/rig"
	"github.com/longshore-edge/longshore/e2e/rig/rigtest"
)

// network is a hub and a box in namespaces of their own, the box behind a router with address translation. Tests reach
// both through doors of their own, past what the network suffers.
type network struct {
	t *testing.T
	// hub, router and box name the namespaces.
	hub, router, box string
	// outside is the router's last address byte on the hub's side.
	outside int
}

// hubMQTT is the hub's door for edges.
const hubMQTT = "10.77.0.1:1883"

var networks atomic.Int64

func newNetwork(t *testing.T) *network {
	t.Helper()
	rigtest.NeedRoot(t, "network namespaces")
	name := fmt.Sprintf("longshore-%d-%d-", os.Getpid(), networks.Add(1))
	n := &network{t: t, hub: name + "hub", router: name + "router", box: name + "box", outside: 2}
	for _, ns := range []string{n.hub, n.router, n.box} {
		n.run("ip", "netns", "add", ns)
		t.Cleanup(func() { n.run("ip", "netns", "del", ns) })
		n.in(ns, "ip", "link", "set", "lo", "up")
	}
	n.run("ip", "link", "add", "up0", "netns", n.hub, "type", "veth", "peer", "name", "out0", "netns", n.router)
	n.run("ip", "link", "add", "in0", "netns", n.router, "type", "veth", "peer", "name", "eth0", "netns", n.box)
	for _, a := range [][3]string{{n.hub, "up0", "10.77.0.1/24"}, {n.router, "out0", "10.77.0.2/24"}, {n.router, "in0", "192.168.77.1/24"}, {n.box, "eth0", "192.168.77.2/24"}} {
		n.in(a[0], "ip", "address", "add", a[2], "dev", a[1])
		n.in(a[0], "ip", "link", "set", a[1], "up")
	}
	n.in(n.box, "ip", "route", "add", "default", "via", "192.168.77.1")
	n.in(n.router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
	n.iptables("-t", "nat", "-A", "POSTROUTING", "-o", "out0", "-j", "MASQUERADE")
	return n
}

func (n *network) run(command string, args ...string) {
	n.t.Helper()
	if out, err := exec.Command(rigtest.Need(n.t, command), args...).CombinedOutput(); err != nil {
		n.t.Fatalf("%s %v: %v: %s", command, args, err, out)
	}
}

func (n *network) in(ns string, args ...string) {
	n.t.Helper()
	args[0] = rigtest.Need(n.t, args[0])
	n.run("ip", append([]string{"netns", "exec", ns}, args...)...)
}

func (n *network) iptables(args ...string) {
	n.t.Helper()
	n.in(n.router, append([]string{"iptables"}, args...)...)
}

// moveOutside gives the router another address, as a provider does over night: all mappings are gone.
func (n *network) moveOutside() {
	n.t.Helper()
	old := n.outside
	n.outside++
	n.in(n.router, "ip", "address", "add", fmt.Sprintf("10.77.0.%d/24", n.outside), "dev", "out0")
	n.in(n.router, "ip", "address", "del", fmt.Sprintf("10.77.0.%d/24", old), "dev", "out0")
	// The last address takes its route with it, or leaves the next one as a secondary of none.
	n.in(n.router, "ip", "address", "replace", fmt.Sprintf("10.77.0.%d/24", n.outside), "dev", "out0")
}

// dial dials from within a namespace.
func dial(ns string) func(network, address string) (net.Conn, error) {
	return func(network, address string) (_ net.Conn, err error) {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return nil, err
		}
		defer home.Close()
		there, err := os.Open(filepath.Join("/run/netns", ns))
		if err != nil {
			return nil, err
		}
		defer there.Close()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			return nil, err
		}
		c, err := net.Dial(network, address)
		if herr := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); herr != nil {
			return nil, errors.Join(err, herr) // the thread stays locked, so nobody else gets it
		}
		runtime.UnlockOSThread()
		return c, err
	}
}

// door lets the test reach an address within a namespace.
func (n *network) door(ns, target string) string {
	n.t.Helper()
	k, err := rig.NewLinkVia(dial(ns), target)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(k.Close)
	return k.Addr()
}

// start starts a hub and an edge in their namespaces.
func (n *network) start() (*rigtest.Site, *rig.Edge) {
	n.t.Helper()
	ip := rigtest.Need(n.t, "ip")
	s := rigtest.NewSite(n.t, bin)
	s.Hub.Prefix = []string{ip, "netns", "exec", n.hub}
	s.Hub.Args = []string{"--mqtt", hubMQTT, "--http", s.Hub.HTTP}
	http := s.Hub.HTTP // for people on the hub's own machine; edges would need it for model files only
	s.Hub.HTTP = n.door(n.hub, http)
	s.StartHub()
	e, err := rig.NewEdge(bin, n.t.TempDir(), "dock-1", s.Enroll("dock-1"), hubMQTT, http, rigtest.Readings)
	if err != nil {
		n.t.Fatal(err)
	}
	e.Broker, e.HTTP = n.door(n.box, e.Broker), n.door(n.box, e.HTTP)
	if err := e.Start(n.t.Context(), ip, "netns", "exec", n.box); err != nil {
		n.t.Fatal(err)
	}
	s.EndWithTest(e.Process)
	return s, e
}
