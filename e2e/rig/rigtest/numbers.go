package rigtest

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/longshore-edge/longshore/e2e/rig"
)

// Numbers publishes numbered readings and knows which were acknowledged. Safe for concurrent use.
type Numbers struct {
	Device *rig.Device
	// Filler follows the number in every reading. It must not change while readings are published.
	Filler string

	mu    sync.Mutex
	acked map[string]bool // value: had to be sent again
	sent  int
}

// NewNumbers makes a device of an edge; its connection ends with the test.
func NewNumbers(t *testing.T, e *rig.Edge, client string) *Numbers {
	n := &Numbers{Device: &rig.Device{Address: e.Broker, ClientID: client}, acked: map[string]bool{}}
	t.Cleanup(n.Device.Close)
	return n
}

// number names the i-th reading of this device.
func (n *Numbers) number(i int) string { return fmt.Sprintf("%s-%06d", n.Device.ClientID, i) }

// numberOf is the number in a reading.
func numberOf(payload string) string {
	number, _, _ := strings.Cut(payload, " ")
	return number
}

// Publish publishes so many more readings, each until it is acknowledged.
func (n *Numbers) Publish(ctx context.Context, count int) error {
	for range count {
		n.mu.Lock()
		n.sent++
		number := n.number(n.sent)
		n.mu.Unlock()
		again, err := n.Device.Publish(ctx, "sensors/"+n.Device.ClientID, []byte(number+" "+n.Filler))
		if err != nil {
			return err
		}
		n.mu.Lock()
		n.acked[number] = again
		n.mu.Unlock()
	}
	return nil
}

// Count of acknowledged readings.
func (n *Numbers) Count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.acked)
}

func (n *Numbers) promised() (acked map[string]bool, sent int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.acked), n.sent
}
