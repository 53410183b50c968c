package verdicts

import (
	"fmt"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/tcglog"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

// machine is a host of profile production whose firmware and boot loader log [Events] events.
type machine struct {
	*platformtest.Machine
	firmware vmspec.Firmware // of its VMs
	logs     evidence.Platform
	measured []pcr.Event // as the TPM was extended
}

func newMachine() *machine {
	m := platformtest.New()
	for i := len(m.Events); i < Events; i++ {
		m.Events = append(m.Events, platformtest.Event{PCR: []int{4, 8, 9, 11, 12}[i%5], Type: tcglog.IPL, Data: fmt.Sprintf("part %d of the boot, as a boot loader names it", i)})
	}
	return &machine{m, vmspec.Firmware{BIOS: digest.Of([]byte("bios")), LoaderKernel: digest.Of([]byte("kernel")),
		LoaderInitramfs: digest.Of([]byte("initramfs")), LoaderCmdline: "console=ttyS0"}, m.Logs(), m.Measured()}
}

// boot extends a TPM that has just been powered on.
func (m *machine) boot(dev *tpm.Device) error {
	for _, e := range m.measured {
		_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:]}}}}.Execute(dev)
		if err != nil {
			return err
		}
	}
	return nil
}
