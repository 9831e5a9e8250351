package engine

import (
	"fmt"

	"github.com/longshore-edge/longshore/edgehub/internal/oip"
)

// WarmUp runs one inference on zeros, to find out whether a loaded model really works here. A dimension of any size is 1;
// where that fails and there are such dimensions beside the first (the batch), they are tried larger, since a model of
// images or of long signals may need room for its filters.
func WarmUp(s Session) error {
	var outputs []string
	for _, o := range s.Outputs() {
		outputs = append(outputs, o.Name)
	}
	var first error
	for _, size := range []int64{1, 16, 64, 256} {
		inputs, free, err := zeros(s.Inputs(), size)
		if err == nil {
			_, err = s.Run(inputs, outputs)
		}
		if err == nil {
			return nil
		}
		if first == nil {
			first = fmt.Errorf("warm-up inference on zeros: %w", err)
		}
		if !free {
			break
		}
	}
	return first
}

// zeros makes inputs whose free dimensions, but the first, have the given size, and tells whether there are such.
func zeros(metas []oip.TensorMetadata, size int64) (inputs []oip.Tensor, free bool, err error) {
	for _, m := range metas {
		shape := make([]int64, len(m.Shape))
		for i, d := range m.Shape {
			switch {
			case d >= 0:
				shape[i] = d
			case i == 0:
				shape[i] = 1
			default:
				shape[i], free = size, true
			}
		}
		t, err := oip.Zeros(m.Name, m.Datatype, shape)
		if err != nil {
			return nil, free, fmt.Errorf("input %q: %w", m.Name, err)
		}
		inputs = append(inputs, t)
	}
	return inputs, free, nil
}
