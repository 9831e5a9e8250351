// Package sensor makes the MQTT payloads of a simulated vibration sensor.
package sensor

import (
	"encoding/json"
	"math/rand/v2"

	"github.com/longshore-edge/longshore/e2e/bearing"
)

// Sensor sits on one machine. Not safe for concurrent use.
type Sensor struct {
	machine *bearing.Machine
	next    int64
}

// New puts a sensor on a machine; the same seed makes the same machine, which measures the same again.
func New(seed uint64, c bearing.Condition) *Sensor {
	return &Sensor{machine: bearing.NewMachine(rand.New(rand.NewPCG(seed, 0x5e)), c), next: 1}
}

// SetCondition changes the bearing's condition, as when it breaks.
func (s *Sensor) SetCondition(c bearing.Condition) { s.machine.SetCondition(c) }

// Condition of the bearing.
func (s *Sensor) Condition() bearing.Condition { return s.machine.Condition() }

type payload struct {
	ID     int64     `json:"id"`
	Values []float32 `json:"values"`
}

// Payload measures once. It returns the number of the measurement, from 1 upwards, and the message: {"id":1,"values":[…]}
// with bearing.Window values in g. The result of the inference carries the same id, as a string.
func (s *Sensor) Payload() (id int64, message []byte, err error) {
	id = s.next
	s.next++
	message, err = json.Marshal(payload{ID: id, Values: s.machine.Window()})
	return id, message, err
}
