package orchestrator

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestOneTurnAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var turns turns
		release, err := turns.take(t.Context(), "a")
		check(t, err)
		other, err := turns.take(t.Context(), "b")
		check(t, err)
		other()
		second := make(chan func())
		go func() {
			release, err := turns.take(t.Context(), "a")
			check(t, err)
			second <- release
		}()
		synctest.Wait()
		select {
		case <-second:
			t.Fatal("two had the turn at once")
		default:
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := turns.take(ctx, "a"); !errors.Is(err, context.Canceled) {
			t.Errorf("waited on after the end: %v", err)
		}
		if !turns.taken("a") || turns.taken("b") {
			t.Error("who has a turn is not known")
		}
		release()
		(<-second)()
		if len(turns.held) != 0 {
			t.Errorf("%d names are kept", len(turns.held))
		}
	})
}
