package broker

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

func TestQueueIsFairPerTenant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		if err := q.take(t.Context(), "first"); err != nil {
			t.Fatal(err)
		}
		order := make(chan string, 16)
		wait := func(tenant, vm string) {
			go func() {
				if err := q.take(t.Context(), tenant); err != nil {
					t.Error(err)
				}
				order <- vm
				q.free()
			}()
			synctest.Wait() // it stands in line before the next comes
		}
		for _, vm := range []string{"a1", "a2", "a3", "a4"} {
			wait("a", vm)
		}
		wait("b", "b1")
		wait("c", "c1")
		wait("b", "b2")
		q.free()
		synctest.Wait()
		close(order)
		var got []string
		for vm := range order {
			got = append(got, vm)
		}
		if want := []string{"a1", "b1", "c1", "a2", "b2", "a3", "a4"}; !slices.Equal(got, want) {
			t.Errorf("turns %v, want %v", got, want)
		}
	})
}

func TestQueueForgetsWhoLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		if err := q.take(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error)
		go func() { left <- q.take(ctx, "b") }()
		synctest.Wait()
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("left with %v", err)
		}
		q.free()
		if q.taken || len(q.turn) != 0 || len(q.waiting) != 0 {
			t.Errorf("queue remembers: %+v", &q)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q queue
		if err := q.take(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		for range maxWaiting {
			go q.take(ctx, "a")
		}
		synctest.Wait()
		if err := q.take(ctx, "a"); !errors.Is(err, ErrBusy) {
			t.Errorf("one too many: %v", err)
		}
		cancel()
		synctest.Wait()
	})
}
