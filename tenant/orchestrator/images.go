package orchestrator

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
)

// maxImage bounds a template's ciphertext in bytes.
const maxImage = 64 << 30

// putImage takes the ciphertext of a template's newest version, checks it against its digest, and passes it
// on to every host. It succeeds if at least one host has it then; the others are
// tried again with the next upload.
func (o *Orchestrator) putImage(ctx context.Context, name string, size int64, r io.Reader, by string) error {
	tpl, err := o.template(ctx, name)
	if err != nil {
		return err
	}
	if size != tpl.Size {
		return event.Refuse(event.BadRequest, "image: want a Content-Length of %d", tpl.Size)
	}
	file, err := o.receive(r, tpl)
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	var failed error
	for host := range o.basis().hosts {
		if err := o.pushImage(ctx, host, tpl, file, by); err != nil {
			slog.Warn("send template to host", "template", name, "host", host, "error", err)
			failed = err
		}
	}
	tpl, err = o.template(ctx, name)
	if err == nil && len(tpl.Hosts) == 0 {
		err = failed
		if err == nil {
			err = event.Refuse(event.NoHost, "there is no host to send it to")
		}
	}
	return err
}

// receive streams an image to a file and compares its digest.
func (o *Orchestrator) receive(r io.Reader, tpl ledger.Template) (_ *os.File, err error) {
	file, err := os.CreateTemp(filepath.Join(o.conf.State, uploads), "image-")
	if err != nil {
		return nil, fmt.Errorf("receive image: %w", err)
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(file.Name())
		}
	}()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(file, h), io.LimitReader(r, tpl.Size+1))
	if err != nil {
		return nil, event.Refuse(event.BadRequest, "image: it broke off after %d bytes", n)
	}
	if got := digest.SHA256(h.Sum(nil)); n != tpl.Size || got != tpl.SHA256 {
		return nil, event.Refuse(event.DigestMismatch, "image: %d bytes hash to %s, registered is %s", n, got.Short(), tpl.SHA256.Short())
	}
	return file, nil
}

func (o *Orchestrator) pushImage(ctx context.Context, host string, tpl ledger.Template, file *os.File, by string) error {
	h, err := o.host(host)
	if err != nil {
		return err
	}
	if err := h.PutTemplate(ctx, tpl.SHA256, tpl.Size, io.NewSectionReader(file, 0, tpl.Size)); err != nil {
		return err
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(t.AddTemplateHost(tpl, host), t.Journal(event.Event{Kind: "template.sent",
			Detail: map[string]string{"name": tpl.Name, "version": strconv.Itoa(tpl.Version), "host": host, "sha256": tpl.SHA256.String(), "by": by}}))
	})
	o.zones.journalled()
	return err
}
