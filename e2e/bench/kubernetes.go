package main

import (
	"context"
	"errors"
)

func kubernetes(ctx context.Context, b *bench) error {
	return errors.New("later")
}
