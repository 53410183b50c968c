package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"foothold/e2e/hunt"
	"foothold/internal/luks"
	"foothold/protocol/token"
)

// Collect says in which processes' memory secrets are to be found.
type Collect struct {
	PIDs []int `json:"pids"`
	// VMs says to look at the files that VMs were handed, too, for T1.
	VMs bool `json:"vms"`
	// Guests says to look into VMs' memory, once.
	Guests bool `json:"guests"`
	// Public keys (Ed25519) whose private halves are wanted.
	Public [][]byte `json:"public"`
}

const (
	collectEvery = 400 * time.Millisecond
	overlap      = 256 // bytes; longer than anything that is collected
	fieldLen     = 44  // base64 of 32 bytes
)

// headerHead begins a LUKS2 header: its magic and version.
var headerHead = []byte("LUKS\xba\xbe\x00\x02")

// fields are the names under which 32 secret bytes stand in an unlock message's JSON.
var fields = []string{"passphrase", "password"}

// collect prints each secret once, at the end. It goes on as long as standard input, because
// what is wiped after use is in memory for a moment only.
func collect(in *input) error {
	var c Collect
	if err := in.read(&c); err != nil {
		return err
	}
	k := &collector{public: c.Public, seen: map[string]bool{}}
	ctx := in.untilDone()
	for {
		for _, pid := range c.PIDs {
			hunt.ReadMemory(pid, overlap, all, func(data []byte, address int64) { // it may be starting again
				k.look(data, address)
				k.headers(pid, data, address)
			})
		}
		pids, err := hunt.Processes()
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if isVM(pid) && c.VMs {
				k.files(pid)
			}
			if isVM(pid) && c.Guests {
				if err := hunt.ReadMemory(pid, overlap, all, k.look); err != nil {
					return fmt.Errorf("collect from VM: %w", err)
				}
			}
		}
		if c.Guests {
			return k.say()
		}
		select {
		case <-ctx.Done():
			return k.say()
		case <-time.After(collectEvery):
		}
	}
}

func all(hunt.Region) bool { return true }

type collector struct {
	public [][]byte
	seen   map[string]bool
	list   []hunt.Secret
}

func (k *collector) found(name string, value []byte) {
	if !k.seen[string(value)] {
		k.seen[string(value)] = true
		k.list = append(k.list, hunt.Secret{Name: name, Value: value})
	}
}

func (k *collector) say() error {
	for _, s := range k.list {
		if err := say(s); err != nil {
			return err
		}
	}
	return nil
}

// files reads the small memory files that a VM was handed.
func (k *collector) files(pid int) {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is well formed
	for _, link := range links {
		info, err := os.Stat(link)
		if err != nil || !info.Mode().IsRegular() || info.Size() > overlap {
			continue
		}
		if data, err := os.ReadFile(link); err == nil {
			k.tokens(data)
		}
	}
}

func (k *collector) tokens(data []byte) {
	hunt.Tokens(data, func(t token.Token, kind token.Kind, _ int) { k.found(kind.String(), []byte(t.Reveal())) })
}

// look finds tokens by their form, fields by their name, private keys by what stands
// behind them: Go keeps an Ed25519 key as seed and public key.
func (k *collector) look(data []byte, _ int64) {
	k.tokens(data)
	for _, name := range fields {
		each(data, []byte(`"`+name+`":"`), func(at int) {
			if at+fieldLen > len(data) {
				return
			}
			value, err := base64.StdEncoding.Strict().DecodeString(string(data[at : at+fieldLen]))
			if err == nil && len(value) == 32 {
				k.found(name, value)
			}
		})
	}
	for _, public := range k.public {
		each(data, public, func(end int) {
			begin := end - ed25519.PrivateKeySize
			if begin < 0 {
				return
			}
			seed := bytes.Clone(data[begin : begin+ed25519.SeedSize])
			if bytes.Equal(ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey), public) {
				k.found("VM key", seed)
			}
		})
	}
}

// headers finds whole detached LUKS2 headers.
func (k *collector) headers(pid int, data []byte, address int64) {
	each(data, headerHead, func(end int) {
		header, err := hunt.ReadAt(pid, address+int64(end-len(headerHead)), luks.HeaderSize)
		if err == nil && luks.Check(header) == nil {
			k.found("header", header)
		}
	})
}

// each calls f with the place behind each occurrence.
func each(data, what []byte, f func(end int)) {
	for at := 0; ; {
		i := bytes.Index(data[at:], what)
		if i < 0 {
			return
		}
		at += i + len(what)
		f(at)
	}
}
