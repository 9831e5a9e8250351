// Train makes the demo's bearing classifier: it simulates data, trains two versions, measures them on data they have not
// seen, and writes them as ONNX files.
//
//	go run ./e2e/bearing/train -out e2e/bearing
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/longshore-edge/longshore/e2e/bearing"
	"github.com/longshore-edge/longshore/proto/onnxfile"
)

// recipe of one version.
type recipe struct {
	version                        string
	bands, hidden, epochs, windows int
}

// The first version is what a team ships early: one filter, few measurements. The second has had more of everything.
var recipes = []recipe{
	{version: "1", bands: 1, hidden: 8, epochs: 30, windows: 240},
	{version: "2", bands: 4, hidden: 32, epochs: 30, windows: 12000},
}

// Seeds; no machine of the held-out set is in the training set.
const (
	trainSeed   = 1
	heldOutSeed = 2
	heldOutSize = 4000
)

func main() {
	out := flag.String("out", ".", "`folder` for bearing-1.onnx and bearing-2.onnx")
	flag.Parse()
	if err := run(*out); err != nil {
		fmt.Fprintln(os.Stderr, "train:", err)
		os.Exit(1)
	}
}

func run(folder string) error {
	for _, r := range recipes {
		model, result := train(r, heldOutSize)
		name := filepath.Join(folder, "bearing-"+r.version+".onnx")
		if err := os.WriteFile(name, model, 0o644); err != nil {
			return err
		}
		fmt.Printf("%s: %d bytes, accuracy %.1f%% on %d held-out windows\n", name, len(model), 100*result.accuracy(), heldOutSize)
		fmt.Print(result)
	}
	return nil
}

// train makes one version and measures it on heldOut windows.
func train(r recipe, heldOut int) ([]byte, confusion) {
	f := newFront(r.bands)
	windows, labels := bearing.Dataset(trainSeed, r.windows)
	features := make([][]float64, len(windows))
	for i, w := range windows {
		features[i] = f.features(w)
	}
	n := fit(trainSeed, features, labels, r.hidden, r.epochs)

	var c confusion
	windows, labels = bearing.Dataset(heldOutSeed, heldOut)
	for i, w := range windows {
		_, p := n.forward(n.standardize(f.features(w)))
		c[labels[i]][slices.Index(p, slices.Max(p))]++
	}
	var names string
	for i := range bearing.Conditions {
		names += "," + i.String()
	}
	return export(f, n, []onnxfile.Property{
		{Key: "version", Value: r.version},
		{Key: "labels", Value: names[1:]},
		{Key: "accuracy", Value: fmt.Sprintf("%.3f", c.accuracy())},
	}), c
}

// confusion counts windows by what they are and what they were taken for.
type confusion [bearing.Conditions][bearing.Conditions]int

func (c confusion) accuracy() float64 {
	right, all := 0, 0
	for i, row := range c {
		for j, n := range row {
			all += n
			if i == j {
				right += n
			}
		}
	}
	return float64(right) / float64(all)
}

func (c confusion) String() string {
	out := fmt.Sprintf("%14s", "taken for:")
	for i := range bearing.Conditions {
		out += fmt.Sprintf("%12s", i)
	}
	out += "\n"
	for i, row := range c {
		out += fmt.Sprintf("%14s", bearing.Condition(i))
		for _, n := range row {
			out += fmt.Sprintf("%12d", n)
		}
		out += "\n"
	}
	return out
}
