package site

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog/imalogtest"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/tcglog"
	"foothold/tenant/verify"
)

// What a production host of the site measures beside platformtest's, and what it might instead.
const (
	version, oldVersion = "firmware 1.0", "firmware 0.9"
	otherLine           = platformtest.CommandLine + " init=/bin/sh"
	module, authorities = "SINIT", "authorities"
	bootLoader          = "boot loader"
	separator           = "\x00\x00\x00\x00"
)

var (
	on, off = platformtest.SecureBoot(1), platformtest.SecureBoot(0)
	// db is a signature database of one list whose header has no bytes, other one whose list
	// says that it has 48: whoever skips them reads what follows as trusted.
	db, otherDB = database(0), database(48)
	spy         = platformtest.File("/usr/lib/modules/spy.ko")
)

// database is the variable db with one EFI_SIGNATURE_LIST and room for a header (UEFI
// specification, section 32.4.1).
func database(header uint32) string {
	list := make([]byte, 16, 124) // type, then sizes of the list, its header and its signatures
	for _, n := range []uint32{124, header, 48} {
		list = binary.LittleEndian.AppendUint32(list, n)
	}
	return platformtest.Variable(tcglog.GUID{0xcb}, "db", append(list, bytes.Repeat([]byte{7}, 96)...)...)
}

func wide(s string) string { return string(tcglog.UTF16(s)) }

// launched is a host that was launched dynamically, whose firmware measures a signature
// database, and whose system has come to the third of its phases.
func launched() *platformtest.Machine {
	m := platformtest.New()
	m.Events = slices.Insert(m.Events, 2, platformtest.Event{PCR: 7, Type: tcglog.VariableConfig, Data: db})
	m.Events = append(m.Events, platformtest.Event{PCR: 17, Type: 0x402, Data: module}, platformtest.Event{PCR: 18, Type: 0x404, Data: authorities})
	m.Texts = phases("enter-initrd", "leave-initrd", "sysinit")
	return m
}

func phases(words ...string) (list []platform.Text) {
	for _, w := range words {
		list = append(list, platform.Text{PCR: platform.PhaseRegister, Text: w})
	}
	return list
}

// demanding has reference values that leave open which firmware, command line and state of
// secure boot a host has, and whether it was launched: the policy alone demands these of the
// first host. The second is elsewhere than the policy wants it.
func demanding() *Production {
	p := &Production{Machine: launched(), Boot: launched().Reference(), Userspace: phases("enter-initrd", "leave-initrd", "sysinit", "ready")}
	for i, e := range launched().Events {
		switch e.Data {
		case version:
			p.Boot[i].SHA256 = append(p.Boot[i].SHA256, digest.Of([]byte(oldVersion)))
		case on:
			p.Boot[i].SHA256 = append(p.Boot[i].SHA256, digest.Of([]byte(off)))
		case platformtest.CommandLine:
			p.Boot[i].SHA256 = append(p.Boot[i].SHA256, digest.Of([]byte(otherLine)))
		case wide(platformtest.CommandLine):
			p.Boot[i].SHA256 = append(p.Boot[i].SHA256, digest.Of([]byte(wide(otherLine))))
		}
		p.Boot[i].Optional = slices.Contains(pcr.Dynamic, e.PCR)
	}
	p.Policy.Default = verify.Policy{Locations: []string{"bench"}, MinimumFirmware: version, CommandLines: []string{platformtest.CommandLine}, DRTM: verify.DRTMRequired}
	p.Policy.Hosts = map[string]verify.Policy{"host-2": {Locations: []string{"elsewhere"}}}
	return p
}

// TestProductionLogsThatLie: a production host's quote is genuine, and it is not what it must be,
// or its logs of firmware, kernel and system say something else than was measured.
func TestProductionLogsThatLie(t *testing.T) {
	s := openWith(t, Options{Hosts: 2, Production: demanding()})
	h := s.hosts[0]
	n := len(lies()) + 2 // and two at the end
	for _, o := range others() {
		n += len(o.lies)
	}
	vms := reserve(t, s, n*len(s.hosts)) // in turn at either
	elsewhere := vms[1]
	take := func() *VM {
		vm := vms[0]
		vms = vms[len(s.hosts):]
		return vm
	}
	try := func(t *testing.T, l lie) {
		t.Helper()
		h.mu.Lock()
		h.logs = func() evidence.Platform { p := h.measured(); l.forge(&p); return p }
		h.mu.Unlock()
		a := attack{t, s, take(), nil}
		err := a.opened("").Attest(t.Context(), s)
		if l.why == "" {
			if err != nil {
				t.Errorf("it is refused: %v", err)
			}
			return
		}
		if err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("no refusal of the boot server's: %v", err)
		}
		a.ended(l.why, l.says)
	}
	boots := func(t *testing.T, m *platformtest.Machine) {
		h.mu.Lock()
		h.events, h.own = m.Measured(), m.Logs()
		h.mu.Unlock()
		attack{t, s, nil, nil}.cycle(h, nil)
	}

	// Before any good quote: after it, a VM that was started before outlives no boot of its host.
	for _, o := range others() {
		t.Run(o.name, func(t *testing.T) {
			m := launched()
			o.change(m)
			boots(t, m)
			for _, l := range o.lies {
				t.Run(l.name, func(t *testing.T) { try(t, l) })
			}
		})
	}
	boots(t, launched())
	for _, l := range lies() {
		t.Run(l.name, func(t *testing.T) { try(t, l) })
	}
	t.Run("a good host elsewhere", func(t *testing.T) {
		a := attack{t, s, elsewhere, nil}
		if err := a.opened("").Attest(t.Context(), s); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("no refusal of the boot server's: %v", err)
		}
		a.ended(event.QuoteRefused, `policy: location: seen "bench", want "elsewhere"`)
	})

	// The kernel runs on, whether it says so or not.
	measures := func(t *testing.T, f platform.File) {
		t.Helper()
		_, extended := imalogtest.Entry(f.Name, f.SHA256[:])
		if err := extend(h.bus.TPM, pcr.Platform, extended); err != nil {
			t.Error(err)
		}
	}
	t.Run("a list that has run ahead by a known file", func(t *testing.T) {
		try(t, lie{forge: func(p *evidence.Platform) { // after the quote, and before the list is given
			f := launched().Files[0]
			measures(t, f)
			h.mu.Lock()
			h.own.Kernel = append(h.own.Kernel, platformtest.Measurement(f)...)
			h.mu.Unlock()
			*p = h.measured()
		}})
	})
	t.Run("a file that a running VM's host hides", func(t *testing.T) {
		a := attack{t, s, take(), nil}
		a.compute()
		if err := a.attest(); err != nil {
			t.Fatal(err)
		}
		measures(t, spy)
		a.staticRefused("registers: ")
	})
}
