package template

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/durable"
	"foothold/internal/luks"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/signed"
)

//go:embed assemble.sh
var assembleScript string

// Options of Build.
type Options struct {
	Dir          string             // the template's folder, made or replaced whole
	Name         string             // of the template, a DNS label
	CacheDir     string             // for what the network gave: kernel, bootstraps
	Init         string             // path of foothold-guest, static
	ComponentKey ed25519.PrivateKey // signs kernel and initramfs for the organisation
	Suite        string             // Debian's; default "bookworm"
	Packages     []string           // besides minbase, systemd and CA certificates
	Mirrors      []string           // apt source lines or URLs; default Debian's own
	// AuthenticatedVolume has VMs keep a tag beside each sector of their own volume.
	AuthenticatedVolume bool
	// Rotate encrypts the OS image under a new key, whether it has changed or not.
	Rotate bool
	// Patch bootstraps today's packages, however young the kept bootstrap is.
	Patch    bool
	Progress func(string) // told of each step; may be nil
}

// Build makes a template, or brings the one in Dir up to date: an OS image whose
// inputs have not changed is kept with its key, and only kernel, initramfs and their
// signature are made again. It needs no root, works beside Dir, and moves the result
// there whole; a failure or a crash leaves the old template.
func Build(ctx context.Context, o Options) (*Template, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("build template: %w", err)
	}
	parent := filepath.Dir(o.Dir)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, fmt.Errorf("build template: %w", err)
	}
	unlock, err := durable.Lock(ctx, filepath.Join(parent, "."+filepath.Base(o.Dir)+".lock"))
	if err != nil {
		return nil, fmt.Errorf("build template: %w", err)
	}
	defer unlock()
	work, err := os.MkdirTemp(parent, ".build-")
	if err != nil {
		return nil, fmt.Errorf("build template: %w", err)
	}
	defer removeTree(work)
	t, err := o.build(ctx, work)
	if err != nil {
		return nil, fmt.Errorf("build template %s: %w", o.Name, err)
	}
	return t, nil
}

func (o *Options) check() error {
	if o.Suite == "" {
		o.Suite = "bookworm"
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	for _, dir := range []*string{&o.Dir, &o.CacheDir} {
		abs, err := filepath.Abs(*dir)
		if err != nil || *dir == "" {
			return errors.New("a folder is not named")
		}
		*dir = abs
	}
	switch {
	case !validName.MatchString(o.Name):
		return fmt.Errorf("name %q is not a lower-case DNS label", o.Name)
	case len(o.ComponentKey) != ed25519.PrivateKeySize:
		return errors.New("the component key is missing")
	}
	for _, p := range o.Packages {
		if p == "" || strings.ContainsAny(p, ", \t\n") || p[0] == '-' {
			return fmt.Errorf("package name %q", p)
		}
	}
	return nil
}

// build works in work, which the caller removes.
func (o *Options) build(ctx context.Context, work string) (*Template, error) {
	kernel, err := bootimage.FetchKernel(ctx, o.CacheDir, o.Progress)
	if err != nil {
		return nil, err
	}
	base, err := makeBootstrap(ctx, o, o.Progress)
	if err != nil {
		return nil, err
	}
	out := filepath.Join(work, "template")
	if err := os.Mkdir(out, 0o755); err != nil {
		return nil, err
	}
	inputs := digest.Of([]byte(strings.Join([]string{"1", o.Name, base.digest, assembleScript, factsScript}, "\x00"))).String()
	t, err := o.image(ctx, base, inputs, work, out)
	if err != nil {
		return nil, err
	}
	t.Suite, t.Extra = o.Suite, o.Packages
	t.Name, t.Inputs, t.Release, t.KernelDeb = o.Name, inputs, kernel.Release, kernel.Deb
	if err := o.makeComponents(t, kernel, base, out); err != nil {
		return nil, err
	}
	record, err := t.encode()
	if err != nil {
		return nil, err
	}
	if err := durable.WriteFile(filepath.Join(out, recordFile), record, 0o644); err != nil {
		return nil, err
	}
	if err := durable.Replace(out, o.Dir); err != nil {
		return nil, err
	}
	return Open(o.Dir)
}

// image makes the OS image, or takes that of the template in Dir if its inputs are the
// same: as it is, or decrypted and encrypted again where it is to be rotated.
func (o *Options) image(ctx context.Context, base *bootstrap, inputs, work, out string) (*Template, error) {
	if !o.Rotate {
		if t := o.keepImage(inputs, out); t != nil {
			return t, nil
		}
		return o.makeImage(ctx, base, work, out)
	}
	old, err := Open(o.Dir)
	if err != nil || old.Inputs != inputs {
		return o.makeImage(ctx, base, work, out)
	}
	o.Progress("encrypting the OS image under a new key")
	plain := filepath.Join(work, "image")
	if err := old.Plain(plain); err != nil {
		return nil, err
	}
	if err := (verity{root: old.RootHash, offset: old.HashOffset}).check(ctx, plain); err != nil {
		return nil, fmt.Errorf("the OS image is not what it was: %w", err)
	}
	t := *old
	t.Created = time.Now().UTC().Truncate(time.Second)
	return &t, encrypt(&t, plain, out)
}

// keepImage takes over image and key of the template in Dir, if they were made from
// the same inputs and are whole; else it returns nil.
func (o *Options) keepImage(inputs, out string) *Template {
	old, err := Open(o.Dir)
	if err != nil || old.Inputs != inputs {
		return nil
	}
	if sum, err := durable.Digest(old.Image()); err != nil || sum != old.Ciphertext {
		return nil
	}
	if _, err := old.VolumeKey(); err != nil {
		return nil
	}
	for _, name := range []string{imageFile, keyFile} {
		if os.Link(filepath.Join(o.Dir, name), filepath.Join(out, name)) != nil {
			os.Remove(filepath.Join(out, imageFile))
			return nil
		}
	}
	o.Progress("OS image is up to date")
	return old
}

// makeImage assembles, seals with verity, records, and encrypts the OS image.
func (o *Options) makeImage(ctx context.Context, base *bootstrap, work, out string) (*Template, error) {
	o.Progress("assembling the OS image")
	plain := filepath.Join(work, "image")
	if err := inNamespace(ctx, assembleScript, nil, base.tar, filepath.Join(work, "tree"), plain, epoch, uuidOf(base.digest)); err != nil {
		return nil, fmt.Errorf("assemble OS image: %w", err)
	}
	v, err := seal(ctx, plain)
	if err != nil {
		return nil, err
	}
	o.Progress("recording what the OS holds")
	facts, err := readFacts(ctx, plain, filepath.Join(work, "facts"))
	if err != nil {
		return nil, err
	}
	if bad := facts.findings(); len(bad) > 0 {
		return nil, fmt.Errorf("the OS image does not pass its own audit: %v", bad)
	}
	t := &Template{Created: time.Now().UTC().Truncate(time.Second), RootHash: v.root, Salt: v.salt, HashOffset: v.offset, Contents: facts.contents()}
	o.Progress("encrypting the OS image")
	return t, encrypt(t, plain, out)
}

// encrypt writes image and key into out with a new volume key.
func encrypt(t *Template, plain, out string) error {
	key := luks.NewKey()
	defer key.Wipe()
	src, err := os.Open(plain)
	if err != nil {
		return fmt.Errorf("open OS image: %w", err)
	}
	defer src.Close()
	sum := sha256.New()
	err = durable.Write(filepath.Join(out, imageFile), 0o644, func(f *os.File) error {
		n, err := luks.Encrypt(io.MultiWriter(f, sum), src, key)
		t.Size = n
		return err
	})
	if err != nil {
		return fmt.Errorf("encrypt OS image: %w", err)
	}
	sum.Sum(t.Ciphertext[:0])
	return durable.WriteFile(filepath.Join(out, keyFile), key.Reveal(), 0o600)
}

// makeComponents builds kernel and initramfs and signs them.
func (o *Options) makeComponents(t *Template, kernel *bootimage.Kernel, base *bootstrap, out string) error {
	o.Progress("building the guest's kernel and initramfs")
	img, err := bootimage.BuildGuest(kernel, o.Init, base.tools, out, o.AuthenticatedVolume)
	if err != nil {
		return err
	}
	t.AuthenticatedVolume = o.AuthenticatedVolume
	t.Components = bootmsg.Components{
		Release:   kernel.Release + "-" + img.Initramfs.SHA256.Short(),
		Created:   time.Now().UTC().Truncate(time.Second),
		Kernel:    bootmsg.Component{Name: "kernel", SHA256: img.Kernel.SHA256, Size: img.Kernel.Size},
		Initramfs: bootmsg.Component{Name: "initramfs", SHA256: img.Initramfs.SHA256, Size: img.Initramfs.Size},
	}
	payload, err := json.Marshal(t.Components)
	if err != nil {
		return fmt.Errorf("encode components: %w", err)
	}
	envelope, err := json.Marshal(signed.Seal(o.ComponentKey, signed.Components, payload))
	if err != nil {
		return fmt.Errorf("encode signed components: %w", err)
	}
	return durable.WriteFile(filepath.Join(out, componentsFile), envelope, 0o644)
}
