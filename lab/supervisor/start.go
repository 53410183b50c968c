package supervisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"foothold/lab"
)

// Start brings a lab up: lock, ground, API socket, supervisor.
func Start(ctx context.Context, state lab.State, progress func(Step)) error {
	lock, err := Lock(ctx, state)
	if err != nil {
		return err
	}
	defer lock.Close() // the supervisor has its own
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	api, err := listenAPI(state)
	if err != nil {
		return err
	}
	defer api.Close()
	o := Options{State: state.Dir, Binaries: filepath.Dir(self), API: api.Addr().String()}
	began := time.Now()
	_ = began
	return Up(ctx, lock, api, o, progress)
}

// listenAPI makes the operators' listening socket, at the port of last time if it is free.
func listenAPI(state lab.State) (*net.TCPListener, error) {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, fmt.Errorf("listen for the API: %w", err)
	}
	return l, nil
}
