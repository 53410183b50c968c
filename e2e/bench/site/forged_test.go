package site

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"testing"

	"foothold/dmz/upstream"
	"foothold/internal/mtls"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	wire "foothold/protocol/upstream"
	"foothold/tenant/authority"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// evil is a boot server in an attacker's hands: it ends VMs' tunnels with a certificate of
// the boot servers' authority, speaks to the orchestrator with one of its own kind, and is
// in league with hosts, so that it reaches their TPMs past the broker.
type evil struct {
	attack
	client *upstream.Client
	cert   tls.Certificate
}

func (a attack) evil() evil {
	a.t.Helper()
	serving, err := a.s.issue(a.s.tenant, authority.Boot, mtls.BootServer, "evil", authority.Server, bootDNS)
	if err != nil {
		a.t.Fatal(err)
	}
	self, err := a.s.issue(a.s.tenant, authority.DMZ, mtls.BootServer, "evil", authority.Client)
	if err != nil {
		a.t.Fatal(err)
	}
	e := evil{attack: a}
	if e.cert, err = tls.LoadX509KeyPair(serving.Cert, serving.Key); err != nil {
		a.t.Fatal(err)
	}
	if e.client, err = upstream.New(upstream.Config{Address: a.s.conf.Upstream, ServerName: orchDNS, TLS: self, ZoneKey: a.s.init.ZoneKey}); err != nil {
		a.t.Fatal(err)
	}
	return e
}

// claim is all that the orchestrator is told for a verdict, but the quote.
type claim struct {
	wire.VerdictRequest
	tunnel, settings digest.SHA256
	nonce            []byte
}

func (c claim) binding() digest.SHA256 {
	return evidence.Binding(evidence.RoleBoot, c.Reservation, c.tunnel, c.settings, c.nonce)
}

// claim ends the VM's tunnel, and spends its T1. vmKey is the loader's own for nil.
func (e evil) claim(vm *VM, vmKey []byte) claim {
	e.t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{e.cert}, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		e.t.Fatal(err)
	}
	defer l.Close()
	type ended struct {
		state tls.ConnectionState
		err   error
	}
	done := make(chan ended, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			done <- ended{err: err}
			return
		}
		defer conn.Close()
		end := conn.(*tls.Conn)
		err = end.Handshake()
		done <- ended{end.ConnectionState(), err}
	}()
	loader, err := e.s.dialTo(e.t.Context(), vm, l.Addr().String())
	if err != nil {
		e.t.Fatal(err)
	}
	defer loader.Close()
	end := <-done
	if end.err != nil {
		e.t.Fatal(end.err)
	}
	if vmKey == nil {
		vmKey = loader.key
	}
	out, err := e.client.BootOpen(e.t.Context(), wire.OpenRequest{Token: vm.t1, Source: vm.from, VMKey: vmKey})
	if err != nil {
		e.t.Fatal(err)
	}
	exporter, err := end.state.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(out.Reservation, out.Nonce), evidence.ExporterLen)
	if err != nil {
		e.t.Fatal(err)
	}
	c := claim{settings: out.Settings, nonce: out.Nonce, VerdictRequest: wire.VerdictRequest{Reservation: out.Reservation, Source: vm.from, ExporterHash: digest.Of(exporter),
		ServerLeaf: e.cert.Certificate[0], LoaderLeaf: loader.leaf, VMKey: vmKey}}
	c.tunnel = evidence.Tunnel(c.ExporterHash, c.ServerLeaf, c.LoaderLeaf, c.VMKey)
	loader.nonce, loader.key = out.Nonce, vmKey
	if own := e.tunnel(loader); own != c.tunnel {
		e.t.Fatal("the tunnel's ends measure different things")
	}
	return c
}

// measure extends into a host's TPM what it should hold for the VM.
func (e evil) measure(h *host, c claim) transport.TPM {
	e.t.Helper()
	var digests []digest.SHA256
	for _, m := range e.measured() {
		digests = append(digests, m.Digest)
	}
	if err := extendAnew(h.bus.TPM, pcr.VM, digests...); err != nil {
		e.t.Fatal(err)
	}
	if err := extendAnew(h.bus.TPM, pcr.Tunnel, c.tunnel); err != nil {
		e.t.Fatal(err)
	}
	return h.bus.TPM
}

// quoteBy has a key of a TPM quote.
func quoteBy(dev transport.TPM, key tpm.Key, scheme tpm2.TPMTSigScheme, qualifying digest.SHA256, parts ...tpm2.TPMSPCRSelection) (evidence.Quote, error) {
	rsp, err := tpm2.Quote{SignHandle: key.Auth(tpm2.PasswordAuth(nil)), QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]}, InScheme: scheme,
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: parts}}.Execute(dev)
	if err != nil {
		return evidence.Quote{}, err
	}
	return evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}, nil
}

// keysScheme is the key's own.
var keysScheme = tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}

// ecdsaWith is a scheme of its own.
func ecdsaWith(hash tpm2.TPMIAlgHash) tpm2.TPMTSigScheme {
	return tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: hash})}
}

func part(bank tpm2.TPMIAlgHash, registers ...int) tpm2.TPMSPCRSelection {
	bits := make([]byte, 3)
	for _, i := range registers {
		bits[i/8] |= 1 << (i % 8)
	}
	return tpm2.TPMSPCRSelection{Hash: bank, PCRSelect: bits}
}

// unrestricted makes a signing key in a TPM that differs from an attestation key in its
// attributes alone.
func unrestricted(t *testing.T, dev transport.TPM, change func(*tpm2.TPMTPublic)) tpm.Key {
	t.Helper()
	template, point := tpm.AIKTemplate(), make([]byte, 32)
	rand.Read(point) // a primary key follows from seed and template alone
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point}, Y: tpm2.TPM2BECCParameter{Buffer: point}})
	change(&template)
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(template)}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(dev) })
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	return tpm.Key{Handle: rsp.ObjectHandle, Name: rsp.Name, Public: *public}
}

func notRestricted(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false }

// TestForgedByBootServerAndHost: a boot server and a host in league give the orchestrator
// quotes of genuine TPMs over all that is right, but for one thing.
func TestForgedByBootServerAndHost(t *testing.T) {
	s := openSite(t, 2)
	off, err := s.newHost(t.Context(), "stranger")
	if err != nil {
		t.Fatal(err)
	}
	sha256, all := tpm2.TPMIAlgHash(tpm2.TPMAlgSHA256), pcr.BootSelection()
	without := func(register int) (list []int) {
		for _, i := range all {
			if i != register {
				list = append(list, i)
			}
		}
		return list
	}
	selection := func(parts ...tpm2.TPMSPCRSelection) func(evil, *claim) (evidence.Quote, error) {
		return func(e evil, c *claim) (evidence.Quote, error) {
			aik, _ := e.vm.host.broker.Keys()
			return quoteBy(e.measure(e.vm.host, *c), aik, keysScheme, c.binding(), parts...)
		}
	}
	good := selection(part(sha256, all...))
	elsewhere := func(at func(evil) *host) func(evil, *claim) (evidence.Quote, error) {
		return func(e evil, c *claim) (evidence.Quote, error) {
			aik, _ := at(e).broker.Keys()
			return quoteBy(e.measure(at(e), *c), aik, keysScheme, c.binding(), part(sha256, all...))
		}
	}
	spare := reserve(t, s, 2) // whose evidence others use
	cases := map[string]struct {
		quote func(evil, *claim) (evidence.Quote, error)
		says  string // empty: it is good
	}{
		"nothing is wrong":                 {good, ""},
		"without the VM's register":        {selection(part(sha256, without(pcr.VM)...)), "selection: "},
		"without the tunnel's register":    {selection(part(sha256, without(pcr.Tunnel)...)), "selection: "},
		"without the platform's register":  {selection(part(sha256, without(pcr.Platform)...)), "selection: "},
		"one register more":                {selection(part(sha256, append([]int{15}, all...)...)), "selection: "},
		"of no register":                   {selection(), "selection: "},
		"SHA-1 bank":                       {selection(part(tpm2.TPMAlgSHA1, all...)), "selection: "},
		"SHA-384 bank":                     {selection(part(tpm2.TPMAlgSHA384, all...)), "selection: "},
		"SHA-1 bank beside it":             {selection(part(sha256, all...), part(tpm2.TPMAlgSHA1, all...)), "selection: "},
		"the VM's registers first":         {selection(part(sha256, pcr.VM, pcr.Tunnel), part(sha256, pcr.Static...)), "selection: "},
		"the VM's registers last":          {selection(part(sha256, pcr.Static...), part(sha256, pcr.VM, pcr.Tunnel)), "selection: "},
		"by another host of the inventory": {elsewhere(func(e evil) *host { return e.other() }), "signature: "},
		"by a host off the inventory":      {elsewhere(func(e evil) *host { return e.off }), "signature: "},
		"signature that says SHA-1": {func(e evil, c *claim) (evidence.Quote, error) {
			q, err := good(e, c)
			if err != nil {
				return q, err
			}
			sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
			if err != nil {
				return q, err
			}
			ec, err := sig.Signature.ECDSA()
			if err != nil {
				return q, err
			}
			ec.Hash = tpm2.TPMAlgSHA1
			q.Signature = tpm2.Marshal(sig)
			return q, nil
		}, "signature: it is not ECDSA with SHA-256"},
		"SHA-1 by another key of that TPM": {func(e evil, c *claim) (evidence.Quote, error) {
			dev := e.measure(e.vm.host, *c)
			aik, _ := e.vm.host.broker.Keys()
			if _, err := quoteBy(dev, aik, ecdsaWith(tpm2.TPMAlgSHA1), c.binding(), part(sha256, all...)); err == nil {
				e.t.Error("the attestation key signed with SHA-1")
			}
			loose := unrestricted(e.t, dev, func(p *tpm2.TPMTPublic) {
				notRestricted(p)
				parms, err := p.Parameters.ECCDetail()
				if err != nil {
					e.t.Fatal(err)
				}
				parms.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
				p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, parms)
			})
			return quoteBy(dev, loose, ecdsaWith(tpm2.TPMAlgSHA1), c.binding(), part(sha256, all...))
		}, "signature: it is not ECDSA with SHA-256"},
		"by an unrestricted key of that TPM": {func(e evil, c *claim) (evidence.Quote, error) {
			dev := e.measure(e.vm.host, *c)
			return quoteBy(dev, unrestricted(e.t, dev, notRestricted), keysScheme, c.binding(), part(sha256, all...))
		}, "signature: the host's attestation key did not make it"},
		"something else that the attestation key signed": {func(e evil, c *claim) (evidence.Quote, error) {
			aik, session := e.vm.host.broker.Keys()
			binding := c.binding()
			rsp, err := tpm2.Certify{ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)), SignHandle: aik.Auth(tpm2.PasswordAuth(nil)),
				QualifyingData: tpm2.TPM2BData{Buffer: binding[:]}, InScheme: keysScheme}.Execute(e.vm.host.bus.TPM)
			if err != nil {
				return evidence.Quote{}, err
			}
			return evidence.Quote{Attest: rsp.CertifyInfo.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}, nil
		}, "quote: "},
		"for another VM's nonce": {func(e evil, c *claim) (evidence.Quote, error) {
			other := *c
			other.nonce = e.claim(spare[0], nil).nonce
			return good(e, &other)
		}, "binding: "},
		"for another role": {func(e evil, c *claim) (evidence.Quote, error) {
			aik, _ := e.vm.host.broker.Keys()
			return quoteBy(e.measure(e.vm.host, *c), aik, keysScheme, evidence.Binding(evidence.RoleUnlock, c.Reservation, c.tunnel, c.settings, c.nonce), part(sha256, all...))
		}, "binding: "},
	}
	vms, next := reserve(t, s, len(cases)), 0
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			e := attack{t, s, vms[next], off}.evil()
			next++
			mine := e.claim(e.vm, nil)
			var err error
			if mine.Quote, err = c.quote(e, &mine); err != nil {
				t.Fatal(err)
			}
			out, err := e.client.BootVerdict(t.Context(), mine.VerdictRequest)
			if c.says == "" {
				if err != nil || len(out.Unique) == 0 {
					t.Errorf("a good quote: %v", err)
				}
				return
			}
			if event.ReasonOf(err) != event.QuoteRefused || len(out.Unique) > 0 {
				t.Errorf("it is answered %v", err)
			}
			e.ended(event.QuoteRefused, c.says)
		})
	}

	// All of a VM's evidence, which was accepted, for another one's: even with the same key.
	t.Run("another VM's evidence", func(t *testing.T) {
		pair := reserve(t, s, 4) // the first and the third at the same host
		e := attack{t, s, pair[0], off}.evil()
		first := e.claim(e.vm, nil)
		var err error
		if first.Quote, err = good(e, &first); err != nil {
			t.Fatal(err)
		}
		if _, err := e.client.BootVerdict(t.Context(), first.VerdictRequest); err != nil {
			t.Fatal(err)
		}
		bundle := e.bundles(first.Reservation)[0].Record.Boot
		if !bytes.Equal(bundle.Quote.Attest, first.Quote.Attest) || bundle.Tunnel.ExporterHash != first.ExporterHash {
			t.Fatal("the bundle holds another quote")
		}
		e.vm = pair[2]
		second := e.claim(e.vm, first.VMKey)
		second.ExporterHash, second.ServerLeaf, second.LoaderLeaf, second.Quote = bundle.Tunnel.ExporterHash, bundle.Tunnel.ServerLeaf, bundle.Tunnel.LoaderLeaf, bundle.Quote
		if _, err := e.client.BootVerdict(t.Context(), second.VerdictRequest); event.ReasonOf(err) != event.QuoteRefused {
			t.Errorf("another VM's evidence: %v", err)
		}
		e.ended(event.QuoteRefused, "binding: ")
	})
}
