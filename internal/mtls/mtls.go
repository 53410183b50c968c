// Package mtls is how two processes authenticate each other: TLS 1.3, certificates
// of a pinned authority on both sides, no tickets, no resumption.
//
// A certificate names its holder by one URI subject alternative name,
//
//	foothold:ROLE:NAME
//
// and is good for exactly one direction by its extended key usage. A listener states
// which roles may make which call ([Allow]); a dialler states which role and name it
// wants to reach. Common names are ignored.
package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
)

// Roles of certificate holders.
const (
	Orchestrator = "orchestrator"
	BootServer   = "bootserver"
	Gateway      = "gateway"
	Firewall     = "firewall"
	Store        = "store"
	Host         = "host"
	Operator     = "operator"
	VM           = "vm"
)

// Identity is a certificate's holder.
type Identity struct{ Role, Name string }

func (id Identity) String() string { return id.Role + "/" + id.Name }

// URI is the subject alternative name of the holder.
func (id Identity) URI() string { return "foothold:" + id.Role + ":" + id.Name }

// ErrIdentity is returned for a certificate without exactly one foothold name.
var ErrIdentity = errors.New("certificate names no single foothold identity")

// Of reads the holder from a verified certificate.
func Of(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 || cert.URIs[0].Scheme != "foothold" {
		return Identity{}, ErrIdentity
	}
	role, name, ok := strings.Cut(cert.URIs[0].Opaque, ":")
	if !ok || role == "" || name == "" || strings.Contains(name, ":") {
		return Identity{}, ErrIdentity
	}
	return Identity{role, name}, nil
}

// Files names a certificate with its key and the authority of the other side, all PEM.
type Files struct {
	Cert string `yaml:"cert" json:"cert"`
	Key  string `yaml:"key" json:"key"`
	CA   string `yaml:"ca" json:"ca"`
}

// Paths lists the files.
func (f Files) Paths() []string { return []string{f.Cert, f.Key, f.CA} }

// Load reads the files.
func (f Files) Load() (tls.Certificate, *x509.CertPool, error) {
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return cert, nil, fmt.Errorf("load certificate: %w", err)
	}
	pool, err := LoadPool(f.CA)
	return cert, pool, err
}

// LoadPool reads a pool of authorities; an empty one is refused.
func LoadPool(file string) (*x509.CertPool, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("load authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("load authority: %s holds no certificate", file)
	}
	return pool, nil
}

// LoadDER reads the first certificate of a PEM file.
func LoadDER(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("load certificate: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("load certificate: %s holds no certificate", file)
	}
	return block.Bytes, nil
}

// ServerConfig accepts clients of the given authority with extended key usage
// clientAuth and a foothold identity of one of the roles.
func ServerConfig(cert tls.Certificate, clients *x509.CertPool, roles ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              clients,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := peer(cs)
			if err != nil {
				return err
			}
			if !slices.Contains(roles, id.Role) {
				return fmt.Errorf("%s may not call here", id)
			}
			return nil
		},
	}
}

// ClientConfig reaches exactly the server whose certificate, of the given authority,
// carries the DNS name and the role.
func ClientConfig(cert tls.Certificate, servers *x509.CertPool, dnsName, role string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		RootCAs:                servers,
		ServerName:             dnsName,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := peer(cs)
			if err != nil {
				return err
			}
			if id.Role != role {
				return fmt.Errorf("%s is not a %s", id, role)
			}
			return nil
		},
	}
}

func peer(cs tls.ConnectionState) (Identity, error) {
	if cs.Version != tls.VersionTLS13 || cs.DidResume || len(cs.VerifiedChains) == 0 {
		return Identity{}, errors.New("connection is not a fresh, verified TLS 1.3 one")
	}
	return Of(cs.PeerCertificates[0])
}

type peerKey struct{}

// Allow passes calls of the listed roles to h, with the caller's identity in the
// context, and refuses all others.
func Allow(h http.Handler, roles ...string) http.Handler {
	return AllowTold(h, func(*http.Request, Identity) {}, roles...)
}

// AllowTold is Allow that calls refused for each caller of another role, before the
// caller has its answer.
func AllowTold(h http.Handler, refused func(*http.Request, Identity), roles ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil {
			http.Error(w, "refused", http.StatusForbidden)
			return
		}
		id, err := peer(*r.TLS)
		if err != nil || !slices.Contains(roles, id.Role) {
			refused(r, id)
			http.Error(w, "refused", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), peerKey{}, id)))
	})
}

// Caller is the identity that [Allow] put into the context.
func Caller(ctx context.Context) (Identity, bool) {
	id, ok := ctx.Value(peerKey{}).(Identity)
	return id, ok
}
