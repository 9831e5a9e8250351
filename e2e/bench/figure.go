package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// figure is one thing that is measured.
type figure struct {
	Name string `json:"name"`
	What string `json:"what"`
	Unit string `json:"unit"`
	// Reach is the value to reach; nil if there is none.
	Reach *reach `json:"reach"`
	// Compare is what KubeEdge was measured to do, or what else stands beside it.
	Compare string `json:"compare,omitempty"`
}

// reach bounds a figure's median from above, or from below.
type reach struct {
	AtMost  *float64 `json:"atMost,omitempty"`
	AtLeast *float64 `json:"atLeast,omitempty"`
}

func atMost(v float64) *reach  { return &reach{AtMost: &v} }
func atLeast(v float64) *reach { return &reach{AtLeast: &v} }

func (r *reach) String() string {
	switch {
	case r == nil:
		return ""
	case r.AtMost != nil:
		return "≤ " + number(*r.AtMost)
	}
	return "≥ " + number(*r.AtLeast)
}

func (r *reach) ok(v float64) bool {
	return r == nil || (r.AtMost == nil || v <= *r.AtMost) && (r.AtLeast == nil || v >= *r.AtLeast)
}

// result is a figure with what was measured.
type result struct {
	figure
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Runs   int     `json:"runs"`
	// OK says whether the median reaches the value; true if there is none.
	OK bool `json:"ok"`

	samples []float64
}

// results in the order in which their first sample came.
type results []*result

// record notes one run's value of a figure. The first one of this go replaces an earlier go's.
func (b *bench) record(f figure, value float64) {
	i := slices.IndexFunc(b.results, func(r *result) bool { return r.Name == f.Name })
	if i < 0 {
		i = len(b.results)
		b.results = append(b.results, &result{})
	}
	r := b.results[i]
	r.samples = append(r.samples, value)
	sorted := slices.Sorted(slices.Values(r.samples))
	r.figure, r.Runs = f, len(sorted)
	r.Median, r.Min, r.Max = quantile(sorted, 0.5), sorted[0], sorted[len(sorted)-1]
	r.OK = f.Reach.ok(r.Median)
	fmt.Printf("   %s: %s %s\n", f.Name, number(value), f.Unit)
}

// quantile of sorted values: the smallest that q of them do not exceed; the median of an even number lies between two.
func quantile(sorted []float64, q float64) float64 {
	n := len(sorted)
	if q == 0.5 && n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	at := int(q * float64(n))
	if float64(at) == q*float64(n) {
		at--
	}
	return sorted[min(max(at, 0), n-1)]
}

// number has three significant digits, and no exponent.
func number(v float64) string {
	switch {
	case v >= 1000 || v <= -1000:
		s := fmt.Sprintf("%.0f", v)
		for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
			s = s[:i] + "," + s[i:]
		}
		return s
	case v == float64(int(v)) || v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (r *result) verdict() string {
	switch {
	case r.Reach == nil:
		return ""
	case r.OK:
		return "yes"
	}
	return "NO"
}

// print the figures of this go.
func (rs results) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nFIGURE\tMEDIAN\tMIN\tMAX\tUNIT\tRUNS\tREACH\tOK\tWHAT")
	for _, r := range rs {
		if r.samples == nil {
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", r.Name, number(r.Median), number(r.Min), number(r.Max), r.Unit, r.Runs, r.Reach, r.verdict(), r.What)
	}
	return t.Flush()
}

func (rs results) write(file string) error {
	b, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// readResults of an earlier go; none if there is no file.
func readResults(file string) (results, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var rs results
	if err := json.Unmarshal(b, &rs); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return rs, nil
}

// What stands between these lines of a page is replaced.
const (
	markerBegin = "<!-- bench:begin -->\n"
	markerEnd   = "<!-- bench:end -->\n"
)

// markdown replaces the table of a page.
func (rs results) markdown(file, where string) error {
	page, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(page), markerBegin)
	_, after, ok2 := strings.Cut(rest, markerEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no lines %q and %q for the table", file, strings.TrimSpace(markerBegin), strings.TrimSpace(markerEnd))
	}
	var t strings.Builder
	fmt.Fprintf(&t, "%s\n\n| figure | median | min – max | unit | runs | reach | ok | KubeEdge |\n|---|---:|---:|---|---:|---:|---|---|\n", where)
	for _, r := range rs {
		fmt.Fprintf(&t, "| `%s`: %s | %s | %s – %s | %s | %d | %s | %s | %s |\n",
			r.Name, r.What, number(r.Median), number(r.Min), number(r.Max), r.Unit, r.Runs, r.Reach, r.verdict(), r.Compare)
	}
	return os.WriteFile(file, []byte(before+markerBegin+t.String()+markerEnd+after), 0o644)
}
