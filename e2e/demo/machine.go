package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/longshore-edge/longshore/e2e/bearing"
	"github.com/longshore-edge/longshore/e2e/bearing/sensor"
	"github.com/longshore-edge/longshore/e2e/rig"
)

// period between two measurements of a machine.
const period = 80 * time.Millisecond

// machine is a simulated machine whose sensor speaks MQTT to its edge's broker: vibration, and a numbered temperature
// reading with each measurement. It remembers what was true and what was acknowledged.
type machine struct {
	device *rig.Device
	name   string
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	sensor *sensor.Sensor
	truths map[string]bearing.Condition
	acked  map[int]bool // value: had to be sent again
}

func startMachine(broker, name string, seed uint64) *machine {
	ctx, cancel := context.WithCancel(context.Background())
	m := &machine{
		device: &rig.Device{Address: broker, ClientID: "sensor-" + name}, name: name, cancel: cancel, done: make(chan struct{}),
		sensor: sensor.New(seed, bearing.Normal), truths: map[string]bearing.Condition{}, acked: map[int]bool{},
	}
	go m.run(ctx)
	return m
}

// stop ends the sensor and waits for it. It may be called twice.
func (m *machine) stop() {
	if m == nil {
		return
	}
	m.cancel()
	<-m.done
	m.device.Close()
}

func (m *machine) run(ctx context.Context) {
	defer close(m.done)
	tick := time.NewTicker(period)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := m.measure(ctx, n); err != nil && ctx.Err() == nil {
			fmt.Println(err)
			return
		}
	}
}

func (m *machine) measure(ctx context.Context, n int) error {
	m.mu.Lock()
	id, payload, err := m.sensor.Payload()
	m.truths[strconv.FormatInt(id, 10)] = m.sensor.Condition()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	if _, err := m.device.Publish(ctx, "machines/"+m.name+"/vibration", payload); err != nil {
		return err
	}
	again, err := m.device.Publish(ctx, "machines/"+m.name+"/temperature", []byte(strconv.Itoa(n)))
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.acked[n] = again
	m.mu.Unlock()
	return nil
}

// count of measurements that were acknowledged.
func (m *machine) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.acked)
}

// wait until so many measurements were acknowledged.
func (m *machine) wait(ctx context.Context, count int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return rig.Until(ctx, func() error {
		if c := m.count(); c < count {
			return fmt.Errorf("sensor %s has %d of %d measurements acknowledged", m.name, c, count)
		}
		return nil
	})
}

// acknowledged returns the numbers of the readings that the broker acknowledged; valid after stop.
func (m *machine) acknowledged() map[int]bool { return m.acked }

func (m *machine) breakDown(c bearing.Condition) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sensor.SetCondition(c)
}

func (m *machine) condition() bearing.Condition {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sensor.Condition()
}

// truth is what was true at a measurement.
func (m *machine) truth(id string) (bearing.Condition, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, ok := m.truths[id]
	return c, ok
}
