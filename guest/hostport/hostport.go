// Package hostport is the VM's end of its local channel to the host (package channel):
// the port, and a last word on it.
package hostport

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"foothold/protocol/channel"
	"foothold/protocol/event"
	"foothold/protocol/frame"
	"foothold/protocol/vmspec"
)

// portsDir is where the kernel names the ports.
const portsDir = "/sys/class/virtio-ports"

// The host's device names its ports after the driver has been loaded, in messages of its
// own (Virtual I/O Device Version 1.2, section 5.3.6.2): on a busy host later than the
// first look.
const (
	within = 10 * time.Second
	pause  = 10 * time.Millisecond // between two looks
)

// farewell bounds the last word and the host's answer to it.
const farewell = 3 * time.Second

// Open opens the virtio-serial port to the host, once it is there.
func Open() (*os.File, error) { return open(portsDir, "/dev") }

func open(ports, devices string) (*os.File, error) {
	for end := time.Now().Add(within); ; time.Sleep(pause) {
		name, err := find(ports)
		if err == nil {
			var f *os.File
			if f, err = os.OpenFile(filepath.Join(devices, name), os.O_RDWR, 0); err == nil {
				return f, nil
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("open the channel to the host: %w", err)
		}
	}
}

// find is the name of the port's device.
func find(ports string) (string, error) {
	list, err := os.ReadDir(ports)
	if err != nil {
		return "", err
	}
	for _, p := range list {
		name, err := os.ReadFile(filepath.Join(ports, p.Name(), "name"))
		if err == nil && strings.TrimSpace(string(name)) == vmspec.ChannelPort {
			return p.Name(), nil
		}
	}
	return "", fmt.Errorf("the platform has none: no port of %s is named %s", ports, vmspec.ChannelPort)
}

// GiveUp is the VM's last word: that it ends, and the reason, a code alone. It waits for
// the host's answer, with which the host ends the VM, for a few seconds at most.
func GiveUp(port io.ReadWriter, reason event.Reason) error {
	done := make(chan error, 1)
	go func() {
		err := frame.Write(port, channel.MaxFrame, channel.Message{Type: channel.Failed, Reason: string(reason)})
		if err == nil {
			var answer channel.Message
			err = frame.Read(port, channel.MaxFrame, &answer)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(farewell):
		return fmt.Errorf("the host does not answer within %s", farewell)
	}
}
