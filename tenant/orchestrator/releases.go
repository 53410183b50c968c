package orchestrator

import (
	"sync"

	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/signed"
)

// components opens a signed release of shared components. The organisation signs it
// off line; nobody here can.
func (o *Orchestrator) components(e signed.Envelope) (bootmsg.Components, error) {
	if c, ok := o.releases.get(e); ok {
		return c, nil
	}
	var c bootmsg.Components
	if err := e.Open(o.ground.componentKey, signed.Components, &c); err != nil {
		return c, event.Refuse(event.SignatureInvalid, "components: %v", err)
	}
	switch {
	case c.Kernel.Name != "kernel" || c.Initramfs.Name != "initramfs" || c.Kernel.SHA256.IsZero() || c.Initramfs.SHA256.IsZero():
		return c, event.Refuse(event.BadRequest, "components: want a kernel and an initramfs with their digests")
	case c.Kernel.Size <= 0 || c.Kernel.Size > bootmsg.MaxKernel || c.Initramfs.Size <= 0 || c.Initramfs.Size > bootmsg.MaxInitramfs:
		return c, event.Refuse(event.BadRequest, "components: kernel or initramfs is too large")
	}
	o.releases.put(e, c)
	return c, nil
}

// maxReleases bounds the releases that are remembered; there is one for each version of a
// template in use, and beyond it they are opened anew.
const maxReleases = 256

// releases are those that were found good, by all their bytes, because every VM of a
// template's brings the same. The key that signs them does not change while we run. Its zero
// value is empty.
type releases struct {
	mu    sync.Mutex
	known map[release]bootmsg.Components // guarded by mu
}

// release is a signed envelope's content.
type release struct{ payload, signature string }

func (k *releases) get(e signed.Envelope) (bootmsg.Components, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c, ok := k.known[release{string(e.Payload), string(e.Signature)}]
	return c, ok
}

func (k *releases) put(e signed.Envelope, c bootmsg.Components) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil || len(k.known) >= maxReleases {
		k.known = map[release]bootmsg.Components{}
	}
	k.known[release{string(e.Payload), string(e.Signature)}] = c
}
