// Package wiring makes the lab's networks: a network namespace for each place, a
// bridge for each local network, addresses and routes of the table in package lab.
//
// It runs in the supervisor, in network and mount namespaces of its own, so that
// their end takes everything made here along.
package wiring

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namesDir is where `ip netns` looks for named namespaces.
const namesDir = "/run/netns"

// Namespace is an open network namespace.
type Namespace struct{ handle netns.NsHandle }

// Do runs f on a thread inside the namespace. Processes that f starts are born there.
// The thread is thrown away afterwards, so nothing else ever runs on it by mistake.
func (n Namespace) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		if err := unix.Setns(int(n.handle), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// create makes a namespace, names it for `ip netns`, and gives it quiet defaults.
func create(name string) (Namespace, error) {
	type result struct {
		ns  Namespace
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, as above
		handle, err := netns.NewNamed(name)
		if err == nil {
			err = quiet()
		}
		done <- result{Namespace{handle}, err}
	}()
	r := <-done
	if r.err != nil {
		return r.ns, fmt.Errorf("make network namespace %s: %w", name, r.err)
	}
	return r.ns, nil
}

// quiet sets a namespace's defaults: no IPv6, no forwarding (a firewall turns it on
// once its rules are loaded), no redirects, no reply for another interface's address.
// A daemon needs no privilege to listen on a low port: a place is its daemon's alone.
func quiet() error {
	for file, value := range map[string]string{
		"ipv6/conf/all/disable_ipv6":         "1",
		"ipv6/conf/default/disable_ipv6":     "1",
		"ipv4/ip_forward":                    "0",
		"ipv4/conf/all/send_redirects":       "0",
		"ipv4/conf/default/send_redirects":   "0",
		"ipv4/conf/all/accept_redirects":     "0",
		"ipv4/conf/default/accept_redirects": "0",
		"ipv4/conf/all/arp_ignore":           "1",
		"ipv4/ip_unprivileged_port_start":    "0",
	} {
		path := filepath.Join("/proc/sys/net", file)
		err := os.WriteFile(path, []byte(value), 0)
		if os.IsNotExist(err) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", path, err)
		}
	}
	return nil
}
