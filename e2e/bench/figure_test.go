package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A wrong quantile or a value held against the wrong bound would make every figure of the page a lie.
func TestResultsAreJudgedByTheirMedian(t *testing.T) {
	for _, c := range []struct {
		samples []float64
		q, want float64
	}{
		{[]float64{7}, 0.5, 7},
		{[]float64{1, 2, 3}, 0.5, 2},
		{[]float64{1, 2, 3, 4}, 0.5, 2.5},
		{[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 0.9, 9},
		{[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 0.99, 10},
	} {
		if got := quantile(c.samples, c.q); got != c.want {
			t.Errorf("quantile %v of %v is %v, want %v", c.q, c.samples, got, c.want)
		}
	}
	b := &bench{}
	slow := figure{Name: "slow", Unit: "s", Reach: atMost(2)}
	fast := figure{Name: "fast", Unit: "1/s", Reach: atLeast(2)}
	for _, v := range []float64{1, 3, 5} {
		b.record(slow, v)
		b.record(fast, v)
	}
	if s, f := b.results[0], b.results[1]; s.OK || !f.OK || s.Median != 3 || s.Min != 1 || s.Max != 5 || s.Runs != 3 {
		t.Errorf("got %+v and %+v", s, f)
	}
	if got := number(-1234567); got != "-1,234,567" {
		t.Errorf("number: %s", got)
	}
}

// Whoever measures one figure again must keep the others, and the page must keep all that is not the table.
func TestOneFigureMeasuredAgain(t *testing.T) {
	dir := t.TempDir()
	page, file := filepath.Join(dir, "page.md"), filepath.Join(dir, "bench.json")
	if err := os.WriteFile(page, []byte("# Title\n"+markerBegin+"old\n"+markerEnd+"the end\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	first := &bench{}
	first.record(figure{Name: "a", What: "one", Unit: "s"}, 1)
	first.record(figure{Name: "b", What: "two", Unit: "s"}, 2)
	if err := first.results.write(file); err != nil {
		t.Fatal(err)
	}
	again := &bench{}
	var err error
	if again.results, err = readResults(file); err != nil {
		t.Fatal(err)
	}
	again.record(figure{Name: "b", What: "two", Unit: "s"}, 42)
	if err := again.results.markdown(page, "Here."); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, want := range []string{"# Title\n", "Here.", "| `a`: one | 1 |", "| `b`: two | 42 | 42 – 42 | s | 1 |", "the end\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "old") {
		t.Errorf("the old table is still there:\n%s", text)
	}
}
