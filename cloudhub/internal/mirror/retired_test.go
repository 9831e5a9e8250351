package mirror

import (
	"testing"
	"time"
)

// Without it, a second box that was found and switched off would be shown for ever, or one that is still there not at all.
func TestSupersededInstanceIsShownWhileItLives(t *testing.T) {
	now := time.Now()
	r := &record{retired: []retired{{EdgeState: EdgeState{Instance: "a", LastContact: now}}, {EdgeState: EdgeState{Instance: "b", LastContact: now}}}}
	if got := r.rivals(now); len(got) != 0 {
		t.Errorf("shown before any was heard again: %+v", got)
	}
	r.outlived("b", now.Add(time.Hour))
	for after, want := range map[time.Duration]int{time.Hour: 1, time.Hour + retiredShown - 1: 1, time.Hour + retiredShown: 0} {
		if got := r.rivals(now.Add(after)); len(got) != want || want == 1 && got[0].Instance != "b" {
			t.Errorf("after %v: %+v, want %d", after, got, want)
		}
	}
}
