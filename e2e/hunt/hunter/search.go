package main

import (
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"strings"

	"foothold/e2e/hunt"
)

// Search says what to look for, and where.
type Search struct {
	Secrets []hunt.Secret `json:"secrets"`
	Folders []string      `json:"folders"`
	// Guest is the size of a VM's memory in bytes: it is the guest's, and left out of QEMU's.
	Guest int64 `json:"guest"`
}

// vmm begins the arguments of a VM's process.
const vmm = "qemu-system-"

func search(in *input) error {
	var s Search
	if err := in.read(&s); err != nil {
		return err
	}
	m, err := hunt.NewMatcher(s.Secrets)
	if err != nil {
		return err
	}
	var all []hunt.Find
	for _, dir := range s.Folders {
		found, err := m.Files(dir)
		if err != nil {
			return err
		}
		all = append(all, found...)
	}
	pids, err := hunt.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		guest := int64(0)
		if isVM(pid) {
			guest = s.Guest
		}
		found, err := m.Process(pid, guest)
		if err != nil {
			return err
		}
		all = append(all, found...)
	}
	for _, f := range all {
		if err := say(f); err != nil {
			return err
		}
	}
	return nil
}

func isVM(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.HasPrefix(string(data), vmm)
}

// Plant is a secret to hold in memory and to send once, as one datagram.
type Plant struct {
	Secret []byte `json:"secret"`
	To     string `json:"to"` // ADDRESS:PORT
}

func plant(in *input) error {
	var p Plant
	if err := in.read(&p); err != nil {
		return err
	}
	conn, err := net.Dial("udp", p.To)
	if err != nil {
		return fmt.Errorf("plant: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("a datagram with " + hex.EncodeToString(p.Secret))); err != nil {
		return fmt.Errorf("plant: %w", err)
	}
	if err := say("planted"); err != nil {
		return err
	}
	<-in.untilDone().Done()
	_, err = fmt.Fprintln(os.Stderr, len(p.Secret)) // held until here
	return err
}
