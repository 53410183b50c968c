package agent

import (
	"errors"
	"testing"
	"time"
)

// TestTheLastWordIsBounded: a host whose device never answers the driver keeps no VM from its end.
func TestTheLastWordIsBounded(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	ended := make(chan error, 1)
	go func() { ended <- within(time.Millisecond, func() error { <-hang; return nil }) }()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a word that was not said is taken for said")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the VM waits for its host")
	}
	why := errors.New("no port")
	if err := within(time.Minute, func() error { return why }); err != why {
		t.Errorf("%v, want %v", err, why)
	}
}
