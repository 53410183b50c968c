package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
)

// errStreamEnded tells that the server closed a stream that should go on.
var errStreamEnded = errors.New("the stream ended")

// eachLine hands every non-empty line to f until ctx ends, which is no error.
func eachLine(ctx context.Context, r io.Reader, f func([]byte) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 4096), maxLine)
	for s.Scan() {
		if len(s.Bytes()) == 0 {
			continue // keeps the connection alive
		}
		if err := f(s.Bytes()); err != nil {
			return err
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil
	case s.Err() != nil:
		return fmt.Errorf("%w: %w", ErrUnreachable, s.Err())
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, errStreamEnded)
}
