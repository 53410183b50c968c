// Package template builds, keeps and audits OS templates: what a VM's root file
// system is cloned from.
//
// A template is a folder:
//
//	template.json   Template: digests, root hash, what the OS holds; no key
//	image.enc       ciphertext of the disk image, given to the provider
//	volume.key      the image's volume key, mode 0600, for the vault
//	kernel          guest kernel        } the shared components that the
//	initramfs       shared initramfs    } boot server delivers
//	components.sig  signed.Envelope of bootmsg.Components over the two
//
// The disk image, inside the encryption of package luks, is an EROFS file system of
// HashOffset bytes followed by a dm-verity superblock and hash tree. Its content is a
// Debian minbase with systemd and CA certificates:
//
//   - systemd, systemd-sysv: the service manager and /sbin/init.
//   - ca-certificates: workloads speak TLS to others.
//   - usr-is-merged: says that the tree has the merged /usr, instead of the package
//     usrmerge and 46 MB of Perl.
//
// No udev, no D-Bus, no login, no kernel modules, no set-user-ID program, no tool that
// opens disks.
//
// # How a guest mounts it
//
// All of this happens before systemd starts, from the initramfs, whose package
// bootimage carries the modules and mkfs.ext4:
//
//  1. key := luks.Unlock(header, passphrase), which checks the header strictly.
//  2. devmapper.Crypt("template", "/dev/vda", key, true)
//  3. devmapper.Verity("os", "/dev/mapper/template", ROOTHASH, HASHOFFSET)
//  4. mount -t erofs -o ro,nodev,nosuid /dev/mapper/os ROOT. There is no udev:
//     package devmapper makes its nodes, and systemd sees no .device unit.
//  5. Volume: the same steps 1 and 2 for /dev/vdb, writable, or devmapper.Integrity and
//     CryptAuthenticated where the template asks for it; on the first start alone
//     mkfs.ext4 -q -E nodiscard /dev/mapper/volume; mount it nodev,nosuid; make its
//     folders var 0755, home 0755, root 0700, srv 0755; bind each to ROOT/NAME. /var may be empty:
//     systemd-tmpfiles fills it.
//  6. mount -t overlay -o nodev,nosuid,lowerdir=ROOT/etc,upperdir=U,workdir=W overlay ROOT/etc, U and W
//     on one tmpfs. Write there: machine-id (32 hexadecimal digits, new for each VM;
//     the template's is empty, which would cost a random one each start), hostname, hosts, resolv.conf.
//  7. mount -t tmpfs -o mode=1777,nodev,nosuid tmpfs ROOT/tmp. Move /dev, /proc, /sys and /run (a tmpfs, 0755)
//     to ROOT. Units put under /run/systemd/system are found by systemd, generators are off.
//  8. Move ROOT to /, chroot, exec /sbin/init.
//
// The OS sets up no network and has no resolver daemon: addresses and routes are those
// that the agent left. systemd moves processes that it finds into init.scope; one whose
// argv[0] begins with "@" is not killed at shutdown (systemd.kill on "storage daemons").
// systemctl and systemd-run work for root over /run/systemd/private without D-Bus.
package template

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/internal/strictjson"
	"foothold/protocol/audit"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/signed"
)

// Files of a template's folder.
const (
	recordFile     = "template.json"
	imageFile      = "image.enc"
	keyFile        = "volume.key"
	kernelFile     = "kernel"
	initramfsFile  = "initramfs"
	componentsFile = "components.sig"
)

// maxRecord bounds template.json in bytes; the default template's has 150 KiB.
const maxRecord = 8 << 20

// Template describes one. It holds no secret.
type Template struct {
	Name    string    `json:"name"`
	Created time.Time `json:"created"`                  // of the OS image
	Inputs  string    `json:"inputs"`                   // digest of all that the OS image was made from
	Suite   string    `json:"suite"`                    // Debian's
	Extra   []string  `json:"extra_packages,omitempty"` // chosen besides those of every template

	Ciphertext digest.SHA256 `json:"ciphertext_sha256"` // of image.enc, names the template at the provider
	Size       int64         `json:"size"`              // of image.enc, bytes
	RootHash   digest.SHA256 `json:"root_hash"`         // dm-verity
	Salt       digest.SHA256 `json:"verity_salt"`       //
	HashOffset int64         `json:"hash_offset"`       // bytes: EROFS ends, verity's superblock begins

	// AuthenticatedVolume is the policy for the VMs' own volumes: a tag beside each sector.
	AuthenticatedVolume bool `json:"authenticated_volume"`

	Components bootmsg.Components `json:"components"` // as signed in components.sig
	Release    string             `json:"kernel_release"`
	KernelDeb  digest.SHA256      `json:"kernel_package_sha256"`

	Contents Contents `json:"contents"`

	dir string
}

// Contents is what the OS holds, for Audit to hold against.
type Contents struct {
	Packages []Package    `json:"packages"`
	Users    []audit.User `json:"users"`
	Programs []audit.File `json:"programs"` // every file that may be executed, and libraries that are marked so
	Units    []string     `json:"units"`    // links that enable a unit, in /etc and /usr
}

// Package is an installed Debian package.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// validName is the form of a template's name: a DNS label.
var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Open reads a template's record. It checks no file behind it: Audit does.
func Open(dir string) (*Template, error) {
	f, err := os.Open(filepath.Join(dir, recordFile))
	if err != nil {
		return nil, fmt.Errorf("open template: %w", err)
	}
	defer f.Close()
	t := &Template{dir: dir}
	if err := strictjson.Read(f, maxRecord, t); err != nil {
		return nil, fmt.Errorf("read template %s: %w", dir, err)
	}
	if !validName.MatchString(t.Name) || t.Ciphertext.IsZero() || t.RootHash.IsZero() ||
		t.Size <= 0 || t.HashOffset <= 0 || t.HashOffset >= t.Size {
		return nil, fmt.Errorf("read template %s: the record is not complete", dir)
	}
	return t, nil
}

// List opens every template below a folder; one that does not open is in the error.
func List(parent string) ([]*Template, error) {
	records, err := filepath.Glob(filepath.Join(parent, "*", recordFile))
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var all []*Template
	var bad []error
	for _, record := range records {
		if t, err := Open(filepath.Dir(record)); err != nil {
			bad = append(bad, err)
		} else {
			all = append(all, t)
		}
	}
	return all, errors.Join(bad...)
}

// Dir is the template's folder.
func (t *Template) Dir() string { return t.dir }

// Image is the path of the ciphertext.
func (t *Template) Image() string { return filepath.Join(t.dir, imageFile) }

// Kernel is the path of the guest kernel.
func (t *Template) Kernel() string { return filepath.Join(t.dir, kernelFile) }

// Initramfs is the path of the shared initramfs.
func (t *Template) Initramfs() string { return filepath.Join(t.dir, initramfsFile) }

// VolumeKey reads the image's key. Whoever puts it into the vault may delete the file.
func (t *Template) VolumeKey() (secret.Bytes, error) {
	key, err := os.ReadFile(filepath.Join(t.dir, keyFile))
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read volume key of template %s: %w", t.Name, err)
	}
	if len(key) != luks.KeySize {
		return secret.Bytes{}, fmt.Errorf("read volume key of template %s: %d bytes, want %d", t.Name, len(key), luks.KeySize)
	}
	return secret.New(key), nil
}

// SignedComponents reads the envelope over kernel and initramfs, checks it by the
// organisation's key, and that it says what the record says.
func (t *Template) SignedComponents(key ed25519.PublicKey) (signed.Envelope, error) {
	var e signed.Envelope
	f, err := os.Open(filepath.Join(t.dir, componentsFile))
	if err != nil {
		return e, fmt.Errorf("open signed components: %w", err)
	}
	defer f.Close()
	if err := strictjson.Read(f, bootmsg.MaxMessage, &e); err != nil {
		return e, fmt.Errorf("read signed components: %w", err)
	}
	var c bootmsg.Components
	if err := e.Open(key, signed.Components, &c); err != nil {
		return e, fmt.Errorf("read signed components: %w", err)
	}
	if c.Kernel != t.Components.Kernel || c.Initramfs != t.Components.Initramfs {
		return e, errors.New("signed components are not those of the template's record")
	}
	return e, nil
}

// encode is the record's text.
func (t *Template) encode() ([]byte, error) {
	data, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode template record: %w", err)
	}
	return append(data, '\n'), nil
}
