//go:build system

package plainboot_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/lab/plainboot"
	"foothold/tenant/template"
)

func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("FOOTHOLD_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "foothold")
}

// program builds a static program of the module.
func program(t *testing.T, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
	return out
}

// codes are the distinct codes of an audit's findings.
func codes(t *testing.T, dir string, key ed25519.PublicKey) []string {
	t.Helper()
	report, err := template.Audit(t.Context(), dir, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, f := range report.Findings {
		t.Log(f)
		list = append(list, f.Code)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// flip changes one bit of a file.
func flip(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{b[0] ^ 1}, at); err != nil {
		t.Fatal(err)
	}
}

const volumeSize = 64 << 20 // bytes

// opening makes a fresh header and passphrase.
func opening(t *testing.T, size int64, key secret.Bytes) plainboot.Opening {
	t.Helper()
	pass := secret.Random(32)
	header, err := luks.Header(t.Context(), size, key, pass)
	if err != nil {
		t.Fatal(err)
	}
	return plainboot.Opening{Header: header, Passphrase: pass}
}

// convert encrypts or decrypts one file into another.
func convert(t *testing.T, step func(io.Writer, io.Reader, secret.Bytes) (int64, error), from, to string, key secret.Bytes) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if _, err := step(dst, src, key); err != nil {
		t.Fatal(err)
	}
}

// encryptedVolume is an empty ext4, encrypted.
func encryptedVolume(t *testing.T) (path string, key secret.Bytes) {
	t.Helper()
	plain := filepath.Join(t.TempDir(), "volume")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Truncate(plain, volumeSize), command.Run(t.Context(), "mkfs.ext4", "-q", "-b", "4096", plain)); err != nil {
		t.Fatal(err)
	}
	key = luks.NewKey()
	convert(t, luks.Encrypt, plain, plain+".enc", key)
	return plain + ".enc", key
}

// lookIntoVolume lists the root folder of an encrypted ext4, with its journal replayed.
func lookIntoVolume(t *testing.T, path string, key secret.Bytes) string {
	t.Helper()
	plain := path + ".plain"
	convert(t, luks.Decrypt, path, plain, key)
	_ = command.Run(t.Context(), "e2fsck", "-p", plain) // its status says that it mended what the cut left
	out, err := command.Output(t.Context(), "debugfs", "-R", "ls /", plain)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// TestTemplate builds a template, audits it, boots it encrypted and plain, brings it
// up to date, and alters it.
func TestTemplate(t *testing.T) {
	public, private, _ := ed25519.GenerateKey(rand.Reader)
	init := program(t, "foothold/lab/plainboot/init")
	workload := program(t, "foothold/lab/sample/web")
	parent := t.TempDir()
	o := template.Options{Dir: filepath.Join(parent, "debian"), Name: "debian", CacheDir: cacheDir(t), Init: init,
		ComponentKey: private, Progress: func(s string) { t.Log(s) }}
	first, err := template.Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if got := codes(t, o.Dir, public); len(got) != 0 {
		t.Errorf("a fresh template has findings: %v", got)
	}
	kernel, err := bootimage.FetchKernel(t.Context(), o.CacheDir, nil)
	if err != nil {
		t.Fatal(err)
	}
	boot := func(p plainboot.Options) {
		t.Helper()
		p.Kernel, p.Init, p.Workload, p.WorkDir = kernel, init, workload, t.TempDir()
		r, err := plainboot.Run(t.Context(), p)
		t.Logf("answer after %.1f s, %v", r.Answer.Seconds(), r.Milestones)
		if err != nil {
			t.Errorf("%v\n%s", err, r.Console)
		}
	}
	t.Run("boots encrypted", func(t *testing.T) {
		key, err := first.VolumeKey()
		if err != nil {
			t.Fatal(err)
		}
		volume, volumeKey := encryptedVolume(t)
		boot(plainboot.Options{Disk: first.Image(), Volume: volume, Crypt: &plainboot.Crypt{
			Template: opening(t, first.Size, key), Volume: opening(t, volumeSize, volumeKey), RootHash: first.RootHash, HashOffset: first.HashOffset}})
		if used := lookIntoVolume(t, volume, volumeKey); !strings.Contains(used, "var") {
			t.Errorf("what the OS wrote does not decrypt: %q", used)
		}
	})
	t.Run("boots plain", func(t *testing.T) {
		disk := filepath.Join(parent, "plain")
		if err := first.Plain(disk); err != nil {
			t.Fatal(err)
		}
		boot(plainboot.Options{Disk: disk})
	})
	t.Run("is brought up to date", func(t *testing.T) {
		o.Init = workload
		start := time.Now()
		second, err := template.Build(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("in %.1f s", time.Since(start).Seconds())
		if second.Ciphertext != first.Ciphertext || second.Components.Initramfs == first.Components.Initramfs {
			t.Error("want the same OS image and another initramfs")
		}
		if got := codes(t, o.Dir, public); len(got) != 0 {
			t.Errorf("findings: %v", got)
		}
		left, err := os.ReadDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range left {
			if e.Name() != "debian" && e.Name() != ".debian.lock" && e.Name() != "plain" {
				t.Errorf("left behind: %s", e.Name())
			}
		}
	})
	t.Run("same content, same root hash", func(t *testing.T) {
		again := o
		again.Dir = filepath.Join(parent, "again")
		other, err := template.Build(t.Context(), again)
		if err != nil {
			t.Fatal(err)
		}
		if other.RootHash != first.RootHash || other.Ciphertext == first.Ciphertext {
			t.Error("want the same root hash under another key")
		}
	})
	t.Run("alterations are found", func(t *testing.T) {
		stranger, _, _ := ed25519.GenerateKey(rand.Reader)
		if got := codes(t, o.Dir, stranger); !slices.Equal(got, []string{template.FindSignature}) {
			t.Errorf("another signer: %v", got)
		}
		flip(t, first.Kernel(), 1<<20)
		if got := codes(t, o.Dir, public); !slices.Equal(got, []string{template.FindDigest}) {
			t.Errorf("altered kernel: %v", got)
		}
		flip(t, first.Image(), 5<<20)
		if got := codes(t, o.Dir, public); !slices.Equal(got, []string{template.FindDigest, template.FindVerity}) {
			t.Errorf("altered image: %v", got)
		}
	})
}
