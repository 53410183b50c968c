package site

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/event"
	"foothold/provider/broker"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// cycle cuts a host's TPM off and powers it on again, and extends its registers by
// what the host measures: nothing else of it has booted. between works on the folder of
// the TPM's state while it is off.
func (a attack) cycle(h *host, between func(state string)) {
	a.t.Helper()
	dir := a.s.path(h.entry.Name)
	h.tpm.Stop()
	if between != nil {
		between(filepath.Join(dir, "state"))
	}
	sockets, err := os.MkdirTemp("", "foothold-") // sockets' paths are short
	if err != nil {
		a.t.Fatal(err)
	}
	if h.tpm, err = a.s.power(a.t.Context(), dir, sockets); err != nil {
		a.t.Fatal(err)
	}
	dev, err := tpm.Open(h.tpm.Socket)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { dev.Close() })
	if err := h.measure(a.t.Context(), dev); err != nil {
		a.t.Fatal(err)
	}
	keys, err := broker.KeysOf(h.entry)
	if err != nil {
		a.t.Fatal(err)
	}
	line := &bus{TPM: dev}
	b, err := broker.New(line, keys, turn)
	if err != nil {
		a.t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bus, h.broker = line, b
}

// copyState copies a TPM's state.
func (a attack) copyState(from, to string) {
	a.t.Helper()
	if err := os.RemoveAll(to); err != nil {
		a.t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		a.t.Fatal(err)
	}
}

// advance sets a TPM's clock forward (TPM 2.0 Library, part 3, TPM2_ClockSet).
func advance(t *testing.T, dev transport.TPM, by time.Duration) {
	t.Helper()
	now, err := tpm2.ReadClock{}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	const authSize, owner, password = 9, uint32(tpm2.TPMRHOwner), uint32(tpm2.TPMRSPW)
	c := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	c = binary.BigEndian.AppendUint32(c, 10+4+4+authSize+8)
	c = binary.BigEndian.AppendUint32(c, 0x128)
	c = binary.BigEndian.AppendUint32(c, owner)
	c = binary.BigEndian.AppendUint32(c, authSize)
	c = binary.BigEndian.AppendUint32(c, password)
	c = append(c, 0, 0, 0, 0, 0) // no nonce, no attributes, an empty password
	c = binary.BigEndian.AppendUint64(c, now.CurrentTime.ClockInfo.Clock+uint64(by.Milliseconds()))
	r, err := dev.Send(c)
	if err != nil || binary.BigEndian.Uint32(r[6:]) != 0 {
		t.Fatalf("set the clock: %x, %v", r, err)
	}
}

// TestTPMsThatWereReset: the static registers hold what they held, and the quote is genuine
// and fresh; the TPM's counters tell that it was reset, restarted or put back meanwhile.
func TestTPMsThatWereReset(t *testing.T) {
	cases := []struct {
		name string
		// first is done before the VMs begin that are attacked, then is the attack.
		first, then func(a attack, copy string)
		static      string // what is said of a computing VM's host
		boot        string // what is said for a VM that was on its way up
	}{
		{"reset", nil, func(a attack, _ string) { a.cycle(a.vm.host, nil) },
			"clock: the host has booted 1 times since this VM was admitted", "clock: the host has booted 1 times since this VM was started there"},
		{"restarted", nil, func(a attack, _ string) {
			if _, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUState}).Execute(a.vm.host.bus.TPM); err != nil {
				a.t.Fatal(err)
			}
			a.cycle(a.vm.host, nil)
		}, "clock: the TPM's restart count changed", "clock: the TPM's restart count changed"},
		{"put back to an earlier count", func(a attack, copy string) {
			a.cycle(a.vm.host, func(state string) { a.copyState(state, copy) })
			a.cycle(a.vm.host, nil)
		}, func(a attack, copy string) {
			a.cycle(a.vm.host, func(state string) { a.copyState(copy, state) })
		}, "clock: the TPM's reset count went back by 1", "clock: the TPM's reset count went back by 1"},
		{"put back to an earlier clock", func(a attack, copy string) {
			a.cycle(a.vm.host, func(state string) { a.copyState(state, copy) })
			advance(a.t, a.vm.host.bus.TPM, time.Hour)
		}, func(a attack, copy string) {
			a.cycle(a.vm.host, func(state string) { a.copyState(copy, state) })
		}, "clock: the TPM's clock went back by", "clock: the TPM's clock went back by"},
	}
	top, s := t, openSite(t, len(cases))
	each := func() (vms []*VM) { return reserve(t, s, len(cases)) } // one at each host
	before := each()
	for i, c := range cases {
		a := attack{t, s, before[i], nil}
		if err := a.opened("").Attest(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if c.first != nil {
			c.first(a, s.path("copy-of-"+a.vm.host.entry.Name))
		}
	}
	rising, computing := each(), each()
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			up, run := attack{t, s, rising[i], nil}, attack{t, s, computing[i], nil}
			run.compute()
			if err := run.attest(); err != nil {
				t.Fatal(err)
			}
			whole := attack{top, s, run.vm, nil} // the TPM stays on beyond this part
			c.then(whole, s.path("copy-of-"+run.vm.host.entry.Name))
			run.staticRefused(c.static)
			if err := up.opened("").Attest(t.Context(), s); err == nil || !strings.Contains(err.Error(), "403") {
				t.Errorf("a VM that was on its way up: %v", err)
			}
			up.ended(event.QuoteRefused, c.boot)
		})
	}
	// Who is started after an honest host's boot boots.
	after := each()
	if err := (attack{t, s, after[0], nil}).opened("").Attest(t.Context(), s); err != nil {
		t.Errorf("a VM that was started after its host's boot: %v", err)
	}
}
