package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"time"
)

// lifetime of every certificate: a control plane for tests is never that old.
const lifetime = 10 * 365 * 24 * time.Hour

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// pki is what this process itself needs of the keys in <dir>/pki.
type pki struct {
	ca    authority
	admin tls.Certificate
}

// ensurePKI makes the keys, certificates and kubeconfigs that are not there yet.
func ensurePKI(cfg config) (*pki, error) {
	if err := os.MkdirAll(cfg.path("pki"), 0o700); err != nil {
		return nil, err
	}
	ca, err := ensureAuthority(cfg, "ca")
	if err != nil {
		return nil, err
	}
	frontProxy, err := ensureAuthority(cfg, "front-proxy-ca")
	if err != nil {
		return nil, err
	}
	masters := []string{"system:masters"}
	for _, leaf := range []struct {
		name   string
		issuer authority
		user   string
		groups []string
	}{
		{"apiserver", ca, "kube-apiserver", nil},
		{"admin", ca, "admin", masters},
		{"controller-manager", ca, "system:kube-controller-manager", masters},
		{"scheduler", ca, "system:kube-scheduler", nil},
		{"kubelet-client", ca, "kube-apiserver-kubelet-client", masters},
		{"front-proxy-client", frontProxy, "front-proxy-client", nil},
	} {
		if err := ensureLeaf(cfg, leaf.name, leaf.issuer, pkix.Name{CommonName: leaf.user, Organization: leaf.groups}); err != nil {
			return nil, err
		}
	}
	if err := ensureServiceAccountKey(cfg); err != nil {
		return nil, err
	}
	for _, user := range []string{"admin", "controller-manager", "scheduler"} {
		if err := writeKubeconfig(cfg, user); err != nil {
			return nil, err
		}
	}
	admin, err := tls.LoadX509KeyPair(cfg.path("pki/admin.crt"), cfg.path("pki/admin.key"))
	if err != nil {
		return nil, err
	}
	return &pki{ca: ca, admin: admin}, nil
}

func ensureAuthority(cfg config, name string) (authority, error) {
	crt, key := cfg.path("pki/"+name+".crt"), cfg.path("pki/"+name+".key")
	if der, err := readPEM(crt); !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return authority{}, err
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return authority{}, err
		}
		if der, err = readPEM(key); err != nil {
			return authority{}, err
		}
		private, err := x509.ParseECPrivateKey(der)
		return authority{cert, private}, err
	}
	template := newTemplate(pkix.Name{CommonName: "controlplane-" + name})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	return issue(crt, key, template, nil)
}

func ensureLeaf(cfg config, name string, issuer authority, subject pkix.Name) error {
	crt, key := cfg.path("pki/"+name+".crt"), cfg.path("pki/"+name+".key")
	if _, err := os.Stat(crt); err == nil {
		return nil
	}
	template := newTemplate(subject)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if name == "apiserver" {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		template.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1)}
	}
	_, err := issue(crt, key, template, &issuer)
	return err
}

func newTemplate(subject pkix.Name) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{Subject: subject, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(lifetime)}
}

// issue makes a key and a certificate, signed by itself if issuer is nil. The key is written first: a certificate on disk
// means that both are there.
func issue(crt, key string, template *x509.Certificate, issuer *authority) (authority, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return authority{}, err
	}
	if issuer == nil {
		issuer = &authority{template, private}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer.cert, &private.PublicKey, issuer.key)
	if err != nil {
		return authority{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return authority{}, err
	}
	keyDER, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		return authority{}, err
	}
	if err := writePEM(key, "EC PRIVATE KEY", keyDER); err != nil {
		return authority{}, err
	}
	return authority{cert, private}, writePEM(crt, "CERTIFICATE", der)
}

func ensureServiceAccountKey(cfg config) error {
	if _, err := os.Stat(cfg.path("pki/sa.pub")); err == nil {
		return nil
	}
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		return err
	}
	if err := writePEM(cfg.path("pki/sa.key"), "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(private)); err != nil {
		return err
	}
	return writePEM(cfg.path("pki/sa.pub"), "PUBLIC KEY", public)
}

func writeKubeconfig(cfg config, user string) error {
	var files [3]string
	for i, name := range []string{"ca.crt", user + ".crt", user + ".key"} {
		b, err := os.ReadFile(cfg.path("pki/" + name))
		if err != nil {
			return err
		}
		files[i] = base64.StdEncoding.EncodeToString(b)
	}
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: controlplane, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: %s, user: {client-certificate-data: %s, client-key-data: %s}}]
contexts: [{name: controlplane, context: {cluster: controlplane, user: %s}}]
current-context: controlplane
`, cfg.url(), files[0], user, files[1], files[2], user)
	return os.WriteFile(cfg.path(user+".kubeconfig"), []byte(text), 0o600)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func readPEM(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM block", path)
	}
	return block.Bytes, nil
}
