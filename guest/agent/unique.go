package agent

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"foothold/internal/strictjson"
	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
)

// instance is what makes this machine one start of one VM.
type instance struct {
	bootmsg.Unique
	key ed25519.PrivateKey // made by the loader; the quote vouches for its public half
}

// readInstance reads the unique part and the VM's key below root, and erases both files.
func readInstance(root string) (*instance, error) {
	i := &instance{}
	data, err := take(filepath.Join(root, bundle.UniquePath), bootmsg.MaxUnique)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	seed, err := take(filepath.Join(root, bundle.PrivateKeyPath), ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	if len(seed) != ed25519.SeedSize {
		return nil, errors.New("the VM's key is malformed")
	}
	if err := strictjson.Unmarshal(data, &i.Unique); err != nil {
		return nil, fmt.Errorf("read the unique part: %w", err)
	}
	if err := i.validate(); err != nil {
		return nil, fmt.Errorf("read the unique part: %w", err)
	}
	i.key = ed25519.NewKeyFromSeed(seed)
	return i, nil
}

// take reads a file of at most limit bytes, overwrites it and removes it.
func take(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, limit)
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(make([]byte, len(data)), 0); err != nil {
		return nil, err
	}
	return data, os.Remove(path)
}

// validate checks form; who signed it was checked by the loader.
func (i *instance) validate() error {
	u := &i.Unique
	switch {
	case !vmspec.ValidID(u.Reservation) || u.Start < 1 || !vmspec.ValidName(u.Name):
		return errors.New("no good reservation, start or name")
	case u.Account == "" || len(u.AuthorizedKey) == 0:
		return errors.New("no account that may log in")
	case !u.T2.Is(token.T2):
		return errors.New("no T2")
	case !u.Network.Address.Addr().Is4() || !u.Network.Gateway.Is4() || u.Network.MTU < 1280 || u.Network.MTU > 9000:
		return errors.New("no good network")
	case u.BootURL == "" || u.ServerName == "" || len(u.BootCA) == 0:
		return errors.New("no boot server")
	case len(u.ManifestKey) != ed25519.PublicKeySize || !u.Orchestrator.Is4():
		return errors.New("no orchestrator")
	}
	return nil
}
