// Package pcr is the one table of platform configuration registers: who extends
// which, and what the verifier expects there. The code that extends and the code
// that predicts both use it.
//
//	PCR    extended by                     holds
//	0-7    platform firmware               firmware, its configuration, boot loader, secure-boot state
//	8-9    boot loader                     commands and files it loaded
//	10     kernel (IMA); in the lab the    files of the platform, each before it runs
//	       launcher that stands for it
//	11-14  systemd-stub and -boot          unified kernel image, its parameters
//	16     foothold-host, for one VM       firmware, loader kernel, loader initramfs, settings of the VM
//	17-22  the processor's dynamic launch  what was launched and what that measured; all ones
//	       and what it launched            where there was none
//	23     foothold-host, for one VM       the tunnel between that VM and the boot server
//
// 16 and 23 reset at locality 0 (TCG PC Client Platform TPM Profile, "PCR
// Attributes"); the others only with the host. All values are of the SHA-256 bank; a host
// whose TPM has that bank off is refused, whatever others hold.
package pcr

import (
	"bytes"
	"crypto/sha256"
	"slices"

	"foothold/protocol/digest"
)

// The registers that Foothold names.
const (
	Platform = 10 // measured files of the platform
	VM       = 16 // the VM being attested
	Tunnel   = 23 // its tunnel to the boot server
)

// Static lists the registers that say what a host runs. They change only with a
// host boot (10 grows while a host runs new files).
var Static = append([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}, Dynamic...)

// Launch is the register that a dynamic launch itself extends, from locality 4, which no
// program has; Dynamic are all that it resets, from ones to zeros.
const Launch = 17

var Dynamic = []int{Launch, 18, 19, 20, 21, 22}

// BootSelection lists the registers that a boot quote must cover, no more and no fewer,
// in ascending order.
func BootSelection() []int {
	list := append(StaticSelection(), VM, Tunnel)
	slices.Sort(list)
	return list
}

// StaticSelection lists the registers that a static quote must cover, no more and no fewer.
func StaticSelection() []int { return append([]int{}, Static...) }

// Extend is TPM2_PCR_Extend on one SHA-256 register: H(old || measurement)
// (TPM 2.0 Library, part 1, "PCR Operations").
func Extend(old, measurement digest.SHA256) digest.SHA256 {
	return sha256.Sum256(append(old[:], measurement[:]...))
}

// Event is one entry of Foothold's own measurement log. Only PCR and Digest count;
// Name is a claim of the logging side that no decision may rest on.
type Event struct {
	PCR    int           `json:"pcr"`
	Digest digest.SHA256 `json:"digest"`
	Name   string        `json:"name"`
}

// MaxEvents bounds a log.
const MaxEvents = 4096

// Replay returns the registers that the log leads to from reset (all zero).
func Replay(log []Event) map[int]digest.SHA256 {
	regs := map[int]digest.SHA256{}
	for _, e := range log {
		regs[e.PCR] = Extend(regs[e.PCR], e.Digest)
	}
	return regs
}

// Composite is the digest a TPM puts into a quote: SHA-256 over the selected
// registers in ascending order (TPM 2.0 Library, part 2, TPMS_QUOTE_INFO).
// The selection must be ascending; registers that regs lacks count as they are after a
// host boot.
func Composite(selection []int, regs map[int]digest.SHA256) digest.SHA256 {
	return digest.Of(Values(selection, regs))
}

// Values are the registers that [Composite] hashes, one behind the other.
func Values(selection []int, regs map[int]digest.SHA256) []byte {
	out := make([]byte, 0, len(selection)*sha256.Size)
	for _, i := range selection {
		v, ok := regs[i]
		if !ok {
			v = untouched(i)
		}
		out = append(out, v[:]...)
	}
	return out
}

// untouched is a register's value after a host boot: zeros, and ones in those that only a
// dynamic launch resets (TCG PC Client Platform TPM Profile, "PCR Attributes").
func untouched(index int) digest.SHA256 {
	if slices.Contains(Dynamic, index) {
		return digest.SHA256(bytes.Repeat([]byte{0xff}, sha256.Size))
	}
	return digest.SHA256{}
}
