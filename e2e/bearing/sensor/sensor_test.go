package sensor

import (
	"encoding/json"
	"testing"

	"github.com/longshore-edge/longshore/e2e/bearing"
)

// The payload is what the edge turns into a request: one array that fits the model, and a number to find the result by.
func TestPayload(t *testing.T) {
	s := New(1, bearing.Normal)
	for want := int64(1); want <= 3; want++ {
		id, message, err := s.Payload()
		if err != nil {
			t.Fatal(err)
		}
		var p payload
		if err := json.Unmarshal(message, &p); err != nil || id != want || p.ID != want || len(p.Values) != bearing.Window {
			t.Fatalf("%v: %d, %.60s", err, id, message)
		}
		s.SetCondition(bearing.Ball)
		if s.Condition() != bearing.Ball {
			t.Fatal(s.Condition())
		}
	}
}
