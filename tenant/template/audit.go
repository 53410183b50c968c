package template

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"foothold/internal/durable"
	"foothold/internal/luks"
	"foothold/protocol/digest"
)

// Codes of findings; stable.
const (
	FindDigest     = "digest"      // a file is not the one recorded
	FindSignature  = "signature"   // the components are not signed by the organisation's key
	FindVerity     = "verity"      // the content does not match the root hash
	FindContents   = "contents"    // packages, users, programs or units differ from the record
	FindPrivilege  = "privilege"   // a set-user-ID or set-group-ID file
	FindDevice     = "device"      // a device node, socket or pipe
	FindWritable   = "writable"    // a file that everybody may write
	FindPrivateKey = "private-key" // a private key, or where one is kept
	FindIdentity   = "identity"    // something that belongs to one instance
	FindPassword   = "password"    // a user who can log in
	FindUnit       = "unit"        // a unit that starts and should not
	FindForeign    = "foreign"     // a file where Debian's packages put none
)

// Finding is one thing that is wrong with a template.
type Finding struct {
	Code   string `json:"code"`
	Path   string `json:"path,omitempty"`
	Detail string `json:"detail"`
}

func (f Finding) String() string {
	return strings.TrimSpace(f.Code + " " + f.Path + ": " + f.Detail)
}

// Report is the result of an audit. A template passes if there is no finding.
type Report struct {
	Template *Template `json:"template"`
	Findings []Finding `json:"findings"`
}

// Passed reports whether nothing was found.
func (r *Report) Passed() bool { return r.Template != nil && len(r.Findings) == 0 }

// enabled are the units that may start by themselves.
var enabled = []string{
	"sockets.target → systemd-journald-dev-log.socket",
	"sockets.target → systemd-journald.socket",
	"sysinit.target → systemd-journald.service",
	"sysinit.target → systemd-sysctl.service",
	"sysinit.target → systemd-tmpfiles-setup.service",
}

// Audit opens a template and checks it without running it: digests of all files, the
// organisation's signature over the components, every block against the root hash,
// and what the OS holds against the rules and the record. An error means that the
// audit could not be finished, which is no pass either.
func Audit(ctx context.Context, dir string, key ed25519.PublicKey, progress func(string)) (*Report, error) {
	if progress == nil {
		progress = func(string) {}
	}
	t, err := Open(dir)
	if err != nil {
		return nil, err
	}
	r := &Report{Template: t, Findings: []Finding{}}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".audit-")
	if err != nil {
		return nil, fmt.Errorf("audit template: %w", err)
	}
	defer removeTree(work)
	progress("checking kernel, initramfs and signature")
	if err := r.checkComponents(key); err != nil {
		return nil, fmt.Errorf("audit template: %w", err)
	}
	progress("decrypting the image")
	plain := filepath.Join(work, "image")
	if err := r.decrypt(plain); err != nil {
		return nil, fmt.Errorf("audit template: %w", err)
	}
	progress("checking every block against the root hash")
	v := verity{root: t.RootHash, salt: t.Salt, offset: t.HashOffset}
	if err := v.check(ctx, plain); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("audit template: %w", ctx.Err())
		}
		r.add(FindVerity, "", err.Error())
		return r, nil // what lies behind is not to be believed
	}
	progress("looking at what the OS holds")
	facts, err := readFacts(ctx, plain, filepath.Join(work, "tree"))
	if err != nil {
		return nil, fmt.Errorf("audit template: %w", err)
	}
	r.Findings = append(r.Findings, facts.findings()...)
	r.compare(facts.contents())
	return r, nil
}

func (r *Report) add(code, path, detail string) {
	r.Findings = append(r.Findings, Finding{Code: code, Path: path, Detail: detail})
}

// checkComponents checks kernel and initramfs and who signed them.
func (r *Report) checkComponents(key ed25519.PublicKey) error {
	t := r.Template
	if _, err := t.SignedComponents(key); err != nil {
		r.add(FindSignature, componentsFile, err.Error())
	}
	for name, want := range map[string]digest.SHA256{kernelFile: t.Components.Kernel.SHA256, initramfsFile: t.Components.Initramfs.SHA256} {
		got, err := durable.Digest(filepath.Join(t.dir, name))
		if err != nil {
			return err
		}
		if got != want {
			r.add(FindDigest, name, "is "+got.String()+", the record says "+want.String())
		}
	}
	return nil
}

// decrypt writes the plain image and compares the ciphertext's digest on the way.
func (r *Report) decrypt(plain string) error {
	t := r.Template
	f, err := os.OpenFile(plain, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, err := t.decryptTo(f)
	if err != nil {
		return err
	}
	if sum != t.Ciphertext {
		r.add(FindDigest, imageFile, "is "+sum.String()+", the record says "+t.Ciphertext.String())
	}
	return f.Close()
}

// decryptTo decrypts the image and returns its ciphertext's digest.
func (t *Template) decryptTo(w io.Writer) (digest.SHA256, error) {
	var sum digest.SHA256
	key, err := t.VolumeKey()
	if err != nil {
		return sum, err
	}
	defer key.Wipe()
	src, err := os.Open(t.Image())
	if err != nil {
		return sum, fmt.Errorf("open image: %w", err)
	}
	defer src.Close()
	h := sha256.New()
	if _, err := luks.Decrypt(w, io.TeeReader(src, h), key); err != nil {
		return sum, fmt.Errorf("decrypt image: %w", err)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// Plain writes the decrypted disk image, for a plain boot beside the real one. It
// refuses an image that is not the recorded one.
func (t *Template) Plain(path string) error {
	return durable.Write(path, 0o600, func(f *os.File) error {
		sum, err := t.decryptTo(f)
		if err == nil && sum != t.Ciphertext {
			err = fmt.Errorf("image of template %s is not the recorded one", t.Name)
		}
		return err
	})
}

// compare holds the image's contents against the record, which the second audit uses.
func (r *Report) compare(got Contents) {
	want := r.Template.Contents
	if !slices.Equal(got.Packages, want.Packages) {
		r.add(FindContents, "", "packages are not those of the record")
	}
	if !slices.Equal(got.Users, want.Users) {
		r.add(FindContents, "", "users are not those of the record")
	}
	if !slices.Equal(got.Programs, want.Programs) {
		r.add(FindContents, "", "programs are not those of the record")
	}
	if !slices.Equal(got.Units, want.Units) {
		r.add(FindContents, "", "enabled units are not those of the record")
	}
}

// findings holds an image against the rules that every template obeys.
func (f *facts) findings() []Finding {
	r := &Report{}
	for _, file := range f.files {
		r.checkFile(file)
	}
	for _, name := range f.privateKeys {
		r.add(FindPrivateKey, "/"+name, "holds a private key")
	}
	if f.machineID {
		r.add(FindIdentity, "/etc/machine-id", "is not empty")
	}
	for user, password := range f.passwords {
		if !lockedPassword(password) {
			r.add(FindPassword, "/etc/shadow", user+" has no locked password")
		}
	}
	for _, u := range f.users {
		if _, ok := f.passwords[u.Name]; !ok {
			r.add(FindPassword, "/etc/shadow", u.Name+" has no line")
		}
		if shell := path.Base(u.Shell); shell != "nologin" && shell != "false" {
			r.add(FindPassword, "/etc/passwd", u.Name+" has the shell "+u.Shell)
		}
		if u.UID == 0 && u.Name != "root" {
			r.add(FindPassword, "/etc/passwd", u.Name+" is root under another name")
		}
	}
	for _, unit := range f.enabledUnits() {
		if !slices.Contains(enabled, unit) {
			r.add(FindUnit, "", unit+" is enabled")
		}
	}
	slices.SortFunc(r.Findings, func(a, b Finding) int { return strings.Compare(a.String(), b.String()) })
	return r.Findings
}

// bare are folders that packages leave empty and a template keeps so.
var bare = []string{"root/", "home/", "srv/", "var/", "tmp/", "run/", "boot/", "dev/", "mnt/", "media/", "opt/", "etc/ssh/", "etc/init.d/"}

func (r *Report) checkFile(f fileFact) {
	name := "/" + f.path
	base := path.Base(f.path)
	switch f.kind {
	case 'f', 'd', 'l':
	default:
		r.add(FindDevice, name, fmt.Sprintf("is of the kind %q", f.kind))
	}
	if f.kind == 'f' && f.mode&0o6000 != 0 {
		r.add(FindPrivilege, name, fmt.Sprintf("has mode %o", f.mode))
	}
	if f.kind != 'l' && f.mode&0o002 != 0 && f.mode&0o1000 == 0 {
		r.add(FindWritable, name, fmt.Sprintf("has mode %o", f.mode))
	}
	if base == "authorized_keys" || base == ".ssh" || strings.HasPrefix(base, "ssh_host_") || base == "id_rsa" || base == "id_ed25519" {
		r.add(FindPrivateKey, name, "is a place of SSH keys")
	}
	if slices.ContainsFunc(bare, func(dir string) bool { return strings.HasPrefix(f.path, dir) }) ||
		f.kind == 'f' && strings.HasPrefix(f.path, "usr/local/") || f.path == "etc/ld.so.preload" || f.path == "etc/rc.local" {
		r.add(FindForeign, name, "should not be there")
	}
}
