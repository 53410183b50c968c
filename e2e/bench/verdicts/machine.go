package verdicts

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/tcglog"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

// machine is a host of profile production: its firmware and boot loader log [Events]
// events, its kernel the files of the platform.
type machine struct {
	events   []firmwareEvent
	files    []platform.File
	firmware vmspec.Firmware // of its VMs
	logs     evidence.Platform
	measured []pcr.Event // as the TPM was extended
}

type firmwareEvent struct {
	pcr  int
	typ  tcglog.Type
	data []byte
}

func newMachine() *machine {
	m := &machine{firmware: vmspec.Firmware{BIOS: digest.Of([]byte("bios")), LoaderKernel: digest.Of([]byte("kernel")),
		LoaderInitramfs: digest.Of([]byte("initramfs")), LoaderCmdline: "console=ttyS0"}}
	m.events = append(m.events, firmwareEvent{0, tcglog.CRTMVersion, []byte("firmware 1.0")}, firmwareEvent{7, tcglog.VariableConfig, secureBoot()})
	for i := range 8 {
		m.events = append(m.events, firmwareEvent{i, tcglog.Separator, make([]byte, 4)})
	}
	for i := len(m.events); i < Events; i++ {
		m.events = append(m.events, firmwareEvent{[]int{4, 8, 9, 11, 12}[i%5], tcglog.IPL, fmt.Appendf(nil, "part %d of the boot, as a boot loader names it", i)})
	}
	for _, path := range []string{"/usr/bin/foothold-host", "/usr/bin/qemu-system-x86_64", "/usr/lib/modules/tun.ko"} {
		m.files = append(m.files, platform.File{Name: path, SHA256: digest.Of([]byte(path))})
	}
	return m
}

// secureBoot is UEFI_VARIABLE_DATA of the variable, enabled.
func secureBoot() []byte {
	name := tcglog.UTF16("SecureBoot")
	name = name[:len(name)-2] // without its end
	out := binary.LittleEndian.AppendUint64(tcglog.GlobalVariable[:], uint64(len(name)/2))
	return append(append(binary.LittleEndian.AppendUint64(out, 1), name...), 1)
}

// reference are the events as reference values have them.
func (m *machine) reference() (list []platform.Event) {
	for i, e := range m.events {
		list = append(list, platform.Event{PCR: e.pcr, Component: fmt.Sprintf("part %d", i+1), SHA256: []digest.SHA256{digest.Of(e.data)}, Type: uint32(e.typ)})
	}
	return list
}

// boot extends a TPM that has just been powered on, and writes the logs.
func (m *machine) boot(dev *tpm.Device) error {
	firmware := specID()
	for _, e := range m.events {
		sum := digest.Of(e.data)
		m.measured = append(m.measured, pcr.Event{PCR: e.pcr, Digest: sum})
		firmware = append(append(firmware, words(uint32(e.pcr), uint32(e.typ), 1)...), 0x0b, 0)
		firmware = append(append(append(firmware, sum[:]...), words(uint32(len(e.data)))...), e.data...)
	}
	regs, aggregate := pcr.Replay(m.measured), sha256.New()
	for i := range 10 { // as the kernel does (security/integrity/ima/ima_crypto.c, "boot_aggregate")
		v := regs[i]
		aggregate.Write(v[:])
	}
	kernel, extended := kernelEntry("boot_aggregate", aggregate.Sum(nil))
	m.measured = append(m.measured, pcr.Event{PCR: pcr.Platform, Digest: extended})
	for _, f := range m.files {
		entry, extended := kernelEntry(f.Name, f.SHA256[:])
		kernel = append(kernel, entry...)
		m.measured = append(m.measured, pcr.Event{PCR: pcr.Platform, Digest: extended})
	}
	m.logs = evidence.Platform{Firmware: firmware, Kernel: kernel}
	for _, e := range m.measured {
		_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:]}}}}.Execute(dev)
		if err != nil {
			return err
		}
	}
	return nil
}

func words(list ...uint32) (out []byte) {
	for _, n := range list {
		out = binary.LittleEndian.AppendUint32(out, n)
	}
	return out
}

// specID is a log's first event (TCG PC Client Platform Firmware Profile, "Specification
// ID Version Event"): one bank, SHA-256.
func specID() []byte {
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0)
	out := append(words(0, uint32(tcglog.NoAction)), make([]byte, 20)...)
	return append(append(out, words(uint32(len(spec)))...), spec...)
}

// kernelEntry is an entry of template ima-ng, and what it extends.
func kernelEntry(path string, sum []byte) (entry []byte, extended digest.SHA256) {
	field := func(data []byte) []byte { return append(words(uint32(len(data))), data...) }
	data := append(field(append([]byte("sha256:\x00"), sum...)), field(append([]byte(path), 0))...)
	entry = append(words(imalog.Register), bytes.Repeat([]byte{1}, 20)...)
	return append(append(entry, field([]byte("ima-ng"))...), field(data)...), digest.Of(data)
}
