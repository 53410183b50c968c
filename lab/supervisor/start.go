package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"foothold/client"
	"foothold/internal/durable"
	"foothold/lab"
	"foothold/lab/ground"
)

// portFile remembers the API's address from one start of the lab to the next.
const portFile = "api-address"

// Wish is what a user may ask of a lab.
type Wish struct {
	KeepGoing bool // come up without daemons that do not start
	Patience  int  // multiplies every phase's time limit
}

// Start brings a lab up: lock, accelerator, API socket, ground, supervisor. It
// returns ErrUp when the lab is up already.
func Start(ctx context.Context, state lab.State, w Wish, progress func(Step)) error {
	lock, err := Lock(ctx, state)
	if err != nil {
		return err
	}
	defer lock.Close() // the supervisor has its own
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	began := time.Now()
	accel, err := accelerator(ctx, state, cache)
	if err != nil {
		return fmt.Errorf("probe KVM: %w", err)
	}
	progress(Step{Text: "probe KVM: VMs run with " + accel, Seconds: time.Since(began).Seconds()})
	api, err := listenAPI(state)
	if err != nil {
		return err
	}
	defer api.Close()
	o := Options{State: state.Dir, Binaries: filepath.Dir(self), API: api.Addr().String(), Accel: accel, KeepGoing: w.KeepGoing}
	from := ground.Options{Binaries: o.Binaries, Cache: cache, API: o.API, Accel: accel, Patience: w.Patience}
	if err := ground.Make(ctx, state, from, func(what string, took time.Duration) {
		progress(Step{Text: what, Seconds: took.Seconds()})
	}); err != nil {
		return err
	}
	if err := Up(ctx, lock, api, o, progress); err != nil {
		return err
	}
	return client.Remember(state.Context())
}

// cacheDir keeps what all labs of the user share and what can be fetched again.
func cacheDir() (string, error) {
	if dir := os.Getenv("FOOTHOLD_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find cache folder (set FOOTHOLD_CACHE): %w", err)
	}
	return filepath.Join(dir, "foothold"), nil
}

// listenAPI makes the operators' listening socket, at the address of last time if it
// is free.
func listenAPI(state lab.State) (*net.TCPListener, error) {
	file := filepath.Join(state.Dir, portFile)
	address := "127.0.0.1:0"
	if data, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(data), "127.0.0.1:") {
		address = string(data)
	}
	l, err := net.Listen("tcp4", address)
	if errors.Is(err, unix.EADDRINUSE) {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
	}
	if err != nil {
		return nil, fmt.Errorf("listen for the API: %w", err)
	}
	if err := durable.WriteFile(file, []byte(l.Addr().String()), 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l.(*net.TCPListener), nil
}
