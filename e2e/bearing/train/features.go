package main

import (
	"math"

	"github.com/longshore-edge/longshore/e2e/bearing"
)

// The features are those of envelope analysis: filter the ringing out of the signal, take its envelope, and look at the
// rhythm of the envelope in the frequency domain. All of it is arithmetic that ONNX has operators for (export.go), so
// that the sensor sends plain samples and the model holds the rest.
const (
	taps     = 48 // of a filter
	stride   = 8  // between samples of the envelope: 1,500 Hz
	padding  = 20 // zeros at either end
	envelope = (bearing.Window+2*padding-taps)/stride + 1
	lines    = 44 // of the envelope's spectrum, 11.7 Hz apart: up to the third harmonic of most faults
	tiny     = 1e-6
	floor    = 1e-4
)

// front turns windows into features.
type front struct {
	bands   int
	filters []float32 // [2*bands][taps]: cosine and sine of each band
	rhythm  []float32 // [envelope][2*lines]: cosines, then sines, under a Hann window
}

// newFront spreads bands over 1.8 to 5 kHz, where housings ring.
func newFront(bands int) *front {
	f := &front{bands: bands}
	const low, high = 1800.0, 5000.0
	width := (high - low) / float64(bands)
	for b := range bands {
		center := low + width*(float64(b)+0.5)
		// A Gaussian in time; narrower bands need longer filters, as far as the taps go.
		sigma := min(float64(taps)/5, bearing.SampleRate/(2*width))
		for part := range 2 {
			for i := range taps {
				t := float64(i) - (taps-1)/2.0
				angle := 2*math.Pi*center/bearing.SampleRate*t - float64(part)*math.Pi/2
				f.filters = append(f.filters, float32(math.Exp(-t*t/(2*sigma*sigma))*math.Cos(angle)/sigma))
			}
		}
	}
	f.rhythm = make([]float32, envelope*2*lines)
	for i := range envelope {
		hann := 0.5 - 0.5*math.Cos(2*math.Pi*float64(i)/(envelope-1))
		for k := range lines {
			angle := 2 * math.Pi * float64(i*(k+1)) / envelope
			f.rhythm[i*2*lines+k] = float32(hann * math.Cos(angle) / math.Sqrt(envelope))
			f.rhythm[i*2*lines+lines+k] = float32(hann * math.Sin(angle) / math.Sqrt(envelope))
		}
	}
	return f
}

// features of one window: bands times lines.
func (f *front) features(window []float32) []float64 {
	x := normalize(window)
	out := make([]float64, 0, f.bands*lines)
	for b := range f.bands {
		e := f.envelope(x, b)
		mean := 0.0
		for _, v := range e {
			mean += v / envelope
		}
		sums := make([]float64, 2*lines)
		for i, v := range e {
			for k, w := range f.rhythm[i*2*lines : (i+1)*2*lines] {
				sums[k] += (v - mean) * float64(w)
			}
		}
		for k := range lines {
			out = append(out, math.Log((sums[k]*sums[k]+sums[lines+k]*sums[lines+k])/2+floor))
		}
	}
	return out
}

// normalize takes the mean away and scales to a power of 1.
func normalize(window []float32) []float64 {
	x := make([]float64, len(window))
	mean, power := 0.0, 0.0
	for _, v := range window {
		mean += float64(v) / float64(len(window))
	}
	for i, v := range window {
		x[i] = float64(v) - mean
		power += x[i] * x[i] / float64(len(window))
	}
	for i := range x {
		x[i] /= math.Sqrt(power + tiny)
	}
	return x
}

// envelope of one band.
func (f *front) envelope(x []float64, band int) []float64 {
	cosine, sine := f.filters[2*band*taps:(2*band+1)*taps], f.filters[(2*band+1)*taps:(2*band+2)*taps]
	e := make([]float64, envelope)
	for i := range e {
		a, b := 0.0, 0.0
		for k := range taps {
			if at := i*stride - padding + k; at >= 0 && at < len(x) {
				a += x[at] * float64(cosine[k])
				b += x[at] * float64(sine[k])
			}
		}
		e[i] = math.Sqrt((a*a+b*b)/2 + tiny)
	}
	return e
}
