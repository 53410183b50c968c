package loader

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"strings"
	"time"

	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/signed"
)

// maxCmdline is the kernel's COMMAND_LINE_SIZE on x86, in bytes.
const maxCmdline = 2048

// check verifies both signatures of the grant with the measured keys, and that what
// they say is meant for this VM, this start, this key and this tunnel.
func (b *boot) check(grant *bootmsg.Grant, now time.Time) (bootmsg.Manifest, error) {
	var m bootmsg.Manifest
	if err := grant.Manifest.Open(ed25519.PublicKey(b.Spec.Boot.ManifestKey), signed.Manifest, &m); err != nil {
		return m, event.Refuse(event.SignatureInvalid, "manifest: %v", err)
	}
	var shared bootmsg.Components
	if err := grant.Components.Open(ed25519.PublicKey(b.Spec.Boot.ComponentKey), signed.Components, &shared); err != nil {
		return m, event.Refuse(event.SignatureInvalid, "components: %v", err)
	}
	wrong := func(what string) (bootmsg.Manifest, error) {
		return m, event.Refuse(event.SignatureInvalid, "the manifest is not for this VM: %s", what)
	}
	switch {
	case m.Reservation != b.Spec.Reservation || m.Reservation != b.reserved:
		return wrong("another reservation")
	case m.Start != b.Spec.Start:
		return wrong("another start")
	case !bytes.Equal(m.VMKey, b.public):
		return wrong("another key")
	case m.Tunnel != b.tunnel:
		return wrong("another tunnel")
	case !now.Before(m.Expires):
		return wrong(fmt.Sprintf("it expired at %s, %s ago by this VM's clock", m.Expires.UTC().Format(time.RFC3339), now.Sub(m.Expires).Round(time.Second)))
	case m.Cmdline == "" || len(m.Cmdline) >= maxCmdline || strings.ContainsAny(m.Cmdline, "\x00\n"):
		return wrong("no good command line")
	case m.Kernel != shared.Kernel || m.Initramfs != shared.Initramfs:
		return m, event.Refuse(event.DigestMismatch, "manifest and signed components name different files")
	}
	for _, c := range []struct {
		part bootmsg.Component
		name string
		most int64
	}{{m.Kernel, "kernel", bootmsg.MaxKernel}, {m.Initramfs, "initramfs", bootmsg.MaxInitramfs}, {m.Unique, "unique", bootmsg.MaxUnique}} {
		if c.part.Name != c.name || c.part.SHA256.IsZero() || c.part.Size < 1 || c.part.Size > c.most {
			return wrong("no good " + c.name)
		}
	}
	return m, nil
}
