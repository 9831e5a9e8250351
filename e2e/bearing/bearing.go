// Package bearing simulates the vibration of a rolling bearing, healthy or damaged, for training and showing a classifier.
//
// The physics is the textbook's (Randall and Antoni, "Rolling element bearing diagnostics — a tutorial", 2011): each time
// a ball passes a flaw it strikes, and the strike makes the housing ring at its resonance for about a millisecond. How
// often it strikes follows from the bearing's geometry and the speed of the shaft; a flaw on the inner race passes through
// the loaded zone once per turn, one on a ball goes round with the cage. The rhythm, not the ringing, tells the faults
// apart: the resonance differs from machine to machine.
package bearing

import (
	"fmt"
	"math"
	"math/rand/v2"
)

const (
	// SampleRate of the sensor in Hz.
	SampleRate = 12000
	// Window is the number of samples the classifier takes, 85 ms.
	Window = 1024
)

// Accuracy of the committed models on the trainer's held-out windows.
const (
	Accuracy1 = 0.885
	Accuracy2 = 0.960
)

// Geometry of a deep groove ball bearing 6205: 9 balls, their diameter and that of their circle in mm.
const (
	balls          = 9
	ballDiameter   = 7.94
	circleDiameter = 39.04
	ratio          = ballDiameter / circleDiameter
)

// How often things happen, per turn of the shaft.
const (
	outerPasses = balls / 2.0 * (1 - ratio)                         // balls over a point of the outer race
	innerPasses = balls / 2.0 * (1 + ratio)                         // balls over a point of the inner race
	ballStrikes = circleDiameter / ballDiameter * (1 - ratio*ratio) // a point of a ball on either race
	cageTurns   = (1 - ratio) / 2
)

// Condition of a bearing; the classifier's outputs are in this order.
type Condition int

// The conditions.
const (
	Normal Condition = iota
	InnerRace
	OuterRace
	Ball
	Conditions // how many there are
)

func (c Condition) String() string {
	switch c {
	case Normal:
		return "normal"
	case InnerRace:
		return "inner race"
	case OuterRace:
		return "outer race"
	case Ball:
		return "ball"
	default:
		return fmt.Sprintf("condition %d", int(c))
	}
}

// Machine is one machine with one bearing and a sensor on its housing. Not safe for concurrent use.
type Machine struct {
	random    *rand.Rand
	condition Condition
	speed     float64 // turns per second
	resonance float64 // Hz
	decay     float64 // of the ringing, per second
	strike    float64 // amplitude in g
	noise     float64 // standard deviation in g
	rattle    float64 // chance per second of a knock that has nothing to do with the bearing
	harmonics [3]float64
}

// NewMachine makes a machine as the same random would make it again: a four-pole motor near 1,800 turns a minute, under
// some load, with a flaw of some size.
func NewMachine(random *rand.Rand, c Condition) *Machine {
	between := func(low, high float64) float64 { return low + (high-low)*random.Float64() }
	m := &Machine{random: random, condition: c}
	load := random.Float64()
	m.speed = 30 * (1 - 0.05*load) * between(0.99, 1.01)
	m.resonance = between(2500, 4200)
	m.decay = 2 * math.Pi * m.resonance * between(0.03, 0.08)
	m.noise = between(0.04, 0.12)
	m.strike = m.noise * between(2.5, 10) * (0.7 + 0.6*load)
	m.rattle = between(0, 8)
	for i := range m.harmonics {
		m.harmonics[i] = between(0, 0.15) / float64(i+1)
	}
	return m
}

// SetCondition changes the bearing's condition, as when it breaks; everything else of the machine stays.
func (m *Machine) SetCondition(c Condition) { m.condition = c }

// Condition of the bearing.
func (m *Machine) Condition() Condition { return m.condition }

// Window measures for 85 ms at some moment: Window samples of acceleration in g.
func (m *Machine) Window() []float32 {
	x := make([]float64, Window)
	turn := m.random.Float64() // position of the shaft
	for i := range x {
		angle := 2 * math.Pi * (turn + m.speed*float64(i)/SampleRate)
		for k, a := range m.harmonics {
			x[i] += a * math.Sin(float64(k+1)*angle)
		}
		x[i] += m.noise * m.random.NormFloat64()
	}
	if every := m.period(); every > 0 {
		for at := -every * m.random.Float64() * 2; at < Window/float64(SampleRate); {
			m.ring(x, at, m.strike*m.modulation(turn, at)*(1+0.15*m.random.NormFloat64()))
			at += every * (1 + 0.012*m.random.NormFloat64()) // balls slip a little
		}
	}
	for at := m.pause(); at < Window/float64(SampleRate); at += m.pause() {
		m.ring(x, at, m.noise*8*m.random.Float64())
	}
	out := make([]float32, Window)
	for i, v := range x {
		// The sensor resolves a milli-g.
		out[i] = float32(math.Round(1000*v) / 1000)
	}
	return out
}

// period is the time between two strikes in seconds, 0 for a healthy bearing.
func (m *Machine) period() float64 {
	switch m.condition {
	case InnerRace:
		return 1 / (innerPasses * m.speed)
	case OuterRace:
		return 1 / (outerPasses * m.speed)
	case Ball:
		return 1 / (ballStrikes * m.speed)
	default:
		return 0
	}
}

// modulation is how much of a strike is felt at a time: the flaw moves through the loaded zone, or stays in it.
func (m *Machine) modulation(turn, at float64) float64 {
	switch m.condition {
	case InnerRace:
		return 1 + 0.7*math.Cos(2*math.Pi*(turn+m.speed*at))
	case Ball:
		return 1 + 0.5*math.Cos(2*math.Pi*(turn+cageTurns*m.speed*at))
	default:
		return 1
	}
}

// pause until the next knock in seconds.
func (m *Machine) pause() float64 {
	if m.rattle == 0 {
		return math.Inf(1)
	}
	return m.random.ExpFloat64() / m.rattle
}

// ring adds the housing's answer to a strike at a time in seconds.
func (m *Machine) ring(x []float64, at, amplitude float64) {
	for i := max(0, int(math.Ceil(at*SampleRate))); i < len(x); i++ {
		t := float64(i)/SampleRate - at
		if t*m.decay > 8 {
			return
		}
		x[i] += amplitude * math.Exp(-t*m.decay) * math.Sin(2*math.Pi*m.resonance*t)
	}
}

// Dataset makes windows of different machines, the conditions by turns. The same seed makes the same windows.
func Dataset(seed uint64, size int) (windows [][]float32, conditions []Condition) {
	random := rand.New(rand.NewPCG(seed, 0x6205))
	for i := range size {
		c := Condition(i % int(Conditions))
		windows = append(windows, NewMachine(random, c).Window())
		conditions = append(conditions, c)
	}
	return windows, conditions
}
