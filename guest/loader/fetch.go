package loader

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"io"
	"os"

	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/event"

	"golang.org/x/sys/unix"
)

// delivery is the verified system, in memory files.
type delivery struct {
	kernel, initrd *os.File
	private, size  int64 // where the private archive lies in initrd, in bytes
}

// fetch streams each component into memory, hashing on the way, and assembles
//
//	initrd = initramfs ‖ 0* ‖ unique ‖ 0* ‖ private archive
//
// The kernel takes an uncompressed archive only at a multiple of four bytes and skips
// zero bytes before it.
func (b *boot) fetch(ctx context.Context, m bootmsg.Manifest) (*delivery, error) {
	d := &delivery{}
	if err := b.fill(ctx, d, m); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (b *boot) fill(ctx context.Context, d *delivery, m bootmsg.Manifest) (err error) {
	for _, f := range []struct {
		file **os.File
		name string
	}{{&d.kernel, "kernel"}, {&d.initrd, "initrd"}} {
		if *f.file, err = memoryFile(f.name); err != nil {
			return event.Refuse(event.LoaderFailed, "%v", err)
		}
	}
	for _, part := range []struct {
		path string
		want bootmsg.Component
		into *os.File
	}{
		{bootmsg.PathKernel, m.Kernel, d.kernel},
		{bootmsg.PathInitramfs, m.Initramfs, d.initrd},
		{bootmsg.PathUnique, m.Unique, d.initrd},
	} {
		if err := pad(part.into); err != nil {
			return event.Refuse(event.LoaderFailed, "%v", err)
		}
		if err := b.component(ctx, part.path, part.want, part.into); err != nil {
			return err
		}
	}
	if err := pad(d.initrd); err != nil {
		return event.Refuse(event.LoaderFailed, "%v", err)
	}
	if err := d.appendKey(b.key.Seed()); err != nil {
		return event.Refuse(event.LoaderFailed, "append the VM's key: %v", err)
	}
	return nil
}

// component fetches one part; its size is enforced while it comes.
func (b *boot) component(ctx context.Context, path string, want bootmsg.Component, into io.Writer) error {
	h := sha256.New()
	if err := b.link.Get(ctx, path, want.Size, io.MultiWriter(h, into)); err != nil {
		return event.Refuse(event.BootServerFailed, "%v", err)
	}
	if subtle.ConstantTimeCompare(h.Sum(nil), want.SHA256[:]) != 1 {
		return event.Refuse(event.DigestMismatch, "%s is not what was signed", want.Name)
	}
	b.Say("%s verified, %d bytes", want.Name, want.Size)
	return nil
}

// appendKey is the one place where the VM's private key is written anywhere: into
// the memory that becomes the delivered system's initramfs.
func (d *delivery) appendKey(seed []byte) error {
	defer clear(seed)
	archive, err := bundle.Archive(bundle.File{Path: bundle.PrivateKeyPath, Data: seed})
	if err != nil {
		return err
	}
	defer clear(archive)
	if d.private, err = d.initrd.Seek(0, io.SeekCurrent); err != nil {
		return err
	}
	d.size = int64(len(archive))
	_, err = d.initrd.Write(archive)
	return err
}

// wipe overwrites the private archive, once the kernel has its own copy.
func (d *delivery) wipe() error {
	if _, err := d.initrd.WriteAt(make([]byte, d.size), d.private); err != nil {
		return fmt.Errorf("wipe the VM's key: %w", err)
	}
	return nil
}

// Close frees the memory.
func (d *delivery) Close() {
	for _, f := range []*os.File{d.kernel, d.initrd} {
		if f != nil {
			f.Close()
		}
	}
}

// pad fills a file with zeros to a multiple of four bytes.
func pad(f *os.File) error {
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return fmt.Errorf("align initramfs: %w", err)
	}
	if _, err := f.Write(make([]byte, (4-at%4)%4)); err != nil {
		return fmt.Errorf("align initramfs: %w", err)
	}
	return nil
}

func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
