package main

import (
	"math"
	"math/rand/v2"

	"github.com/longshore-edge/longshore/e2e/bearing"
)

// layer is fully connected, with Adam's moments beside its weights.
type layer struct {
	in, out int
	weights []float64 // [in][out]
	bias    []float64
	// Gradients and moments of the weights, then of the bias.
	gradient, mean, variance []float64
}

func newLayer(random *rand.Rand, in, out int) *layer {
	n := (in + 1) * out
	l := &layer{in: in, out: out, weights: make([]float64, in*out), bias: make([]float64, out),
		gradient: make([]float64, n), mean: make([]float64, n), variance: make([]float64, n)}
	for i := range l.weights {
		l.weights[i] = random.NormFloat64() * math.Sqrt(2/float64(in))
	}
	return l
}

func (l *layer) forward(x []float64) []float64 {
	y := append([]float64(nil), l.bias...)
	for i, v := range x {
		if v == 0 {
			continue
		}
		for j, w := range l.weights[i*l.out : (i+1)*l.out] {
			y[j] += v * w
		}
	}
	return y
}

// backward adds to the gradients and returns the gradient of the input.
func (l *layer) backward(x, dy []float64) []float64 {
	dx := make([]float64, l.in)
	for i, v := range x {
		row := i * l.out
		for j, d := range dy {
			l.gradient[row+j] += v * d
			dx[i] += l.weights[row+j] * d
		}
	}
	for j, d := range dy {
		l.gradient[l.in*l.out+j] += d
	}
	return dx
}

// step is one of Adam (Kingma and Ba, 2015) with decoupled weight decay.
func (l *layer) step(n int, rate, decay float64) {
	const beta1, beta2, epsilon = 0.9, 0.999, 1e-8
	c1, c2 := 1-math.Pow(beta1, float64(n)), 1-math.Pow(beta2, float64(n))
	for i, g := range l.gradient {
		l.mean[i] = beta1*l.mean[i] + (1-beta1)*g
		l.variance[i] = beta2*l.variance[i] + (1-beta2)*g*g
		change := rate * (l.mean[i] / c1) / (math.Sqrt(l.variance[i]/c2) + epsilon)
		if i < len(l.weights) {
			l.weights[i] -= change + rate*decay*l.weights[i]
		} else {
			l.bias[i-len(l.weights)] -= change
		}
		l.gradient[i] = 0
	}
}

// network is a perceptron with one hidden layer over standardized features.
type network struct {
	mean, scale   []float64 // of the features
	hidden, final *layer
}

func (n *network) standardize(features []float64) []float64 {
	x := make([]float64, len(features))
	for i, f := range features {
		x[i] = (f - n.mean[i]) * n.scale[i]
	}
	return x
}

func (n *network) forward(x []float64) (hidden, probabilities []float64) {
	hidden = n.hidden.forward(x)
	for i := range hidden {
		hidden[i] = max(0, hidden[i])
	}
	return hidden, softmax(n.final.forward(hidden))
}

func softmax(x []float64) []float64 {
	top, sum := math.Inf(-1), 0.0
	for _, v := range x {
		top = max(top, v)
	}
	for i, v := range x {
		x[i] = math.Exp(v - top)
		sum += x[i]
	}
	for i := range x {
		x[i] /= sum
	}
	return x
}

const (
	batchSize   = 32
	weightDecay = 0.02
)

// fit trains a network; the same seed and features give the same network.
func fit(seed uint64, features [][]float64, labels []bearing.Condition, hidden, epochs int) *network {
	random := rand.New(rand.NewPCG(seed, 1))
	n := &network{hidden: newLayer(random, len(features[0]), hidden), final: newLayer(random, hidden, int(bearing.Conditions))}
	n.mean, n.scale = moments(features)
	inputs := make([][]float64, len(features))
	for i, f := range features {
		inputs[i] = n.standardize(f)
	}
	steps, total := 0, epochs*len(inputs)/batchSize
	for range epochs {
		order := random.Perm(len(inputs))
		for start := 0; start+batchSize <= len(order); start += batchSize {
			for _, i := range order[start : start+batchSize] {
				n.learn(inputs[i], labels[i])
			}
			steps++
			rate := 0.003 * (1 - float64(steps)/float64(total+1))
			n.hidden.step(steps, rate, weightDecay)
			n.final.step(steps, rate, weightDecay)
		}
	}
	return n
}

// learn adds the gradient of the cross entropy of one example.
func (n *network) learn(x []float64, label bearing.Condition) {
	hidden, d := n.forward(x)
	d[label]--
	for i := range d {
		d[i] /= batchSize
	}
	dh := n.final.backward(hidden, d)
	for i, h := range hidden {
		if h == 0 {
			dh[i] = 0
		}
	}
	n.hidden.backward(x, dh)
}

// moments are the mean and one over the standard deviation of each feature.
func moments(features [][]float64) (mean, scale []float64) {
	mean, scale = make([]float64, len(features[0])), make([]float64, len(features[0]))
	count := float64(len(features))
	for _, f := range features {
		for i, v := range f {
			mean[i] += v / count
		}
	}
	for _, f := range features {
		for i, v := range f {
			scale[i] += (v - mean[i]) * (v - mean[i]) / count
		}
	}
	for i, v := range scale {
		scale[i] = 1 / math.Sqrt(v+1e-9)
	}
	return mean, scale
}
