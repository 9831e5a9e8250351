package main

import (
	"bytes"
	"math"
	"os"
	"testing"

	"github.com/longshore-edge/longshore/e2e/bearing"
)

// The committed file of version 1 must be what the trainer makes: otherwise nobody can say where it comes from. Other
// architectures round differently, so the accuracy is compared, as closely as a quarter of the held-out windows tell it.
func TestTrainerMakesCommittedFile(t *testing.T) {
	model, result := train(recipes[0], heldOutSize/4)
	if math.Abs(result.accuracy()-bearing.Accuracy1) > 0.03 {
		t.Errorf("accuracy is %.3f, stated is %.3f", result.accuracy(), bearing.Accuracy1)
	}
	committed, err := os.ReadFile("../bearing-1.onnx")
	if err != nil {
		t.Fatal(err)
	}
	if len(committed) != len(model) {
		t.Errorf("the committed file has %d bytes, a new one %d: train again and commit", len(committed), len(model))
	}
}

// Training must repeat, or a change of the recipe could not be judged.
func TestTrainingRepeats(t *testing.T) {
	f := newFront(1)
	windows, labels := bearing.Dataset(9, 64)
	features := make([][]float64, len(windows))
	for i, w := range windows {
		features[i] = f.features(w)
	}
	a := export(f, fit(1, features, labels, 4, 3), nil)
	b := export(f, fit(1, features, labels, 4, 3), nil)
	if !bytes.Equal(a, b) {
		t.Error("the same seed gave different models")
	}
}
