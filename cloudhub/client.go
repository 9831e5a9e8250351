package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/pflag"
)

// client asks a running hub.
type client struct {
	address   string
	tokenFile string
	ca        string
	settings  *pflag.FlagSet
}

// flags declares how to reach the hub.
func (c *client) flags() *pflag.FlagSet {
	f := pflag.NewFlagSet("client", pflag.ContinueOnError)
	f.StringVar(&c.address, "api", "http://127.0.0.1:8080", "`address` of the hub (environment LONGSHORE_API)")
	f.StringVar(&c.tokenFile, "api-token-file", "", "`file` with the bearer token of the API (environment LONGSHORE_API_TOKEN_FILE)")
	f.StringVar(&c.ca, "ca", "", "`file` (PEM) of the authority that signed the certificate of an https:// hub; empty: the system's (environment LONGSHORE_CA)")
	c.settings = f
	return f
}

// get asks for a path; the caller closes the answer's body.
func (c *client) get(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	if err := fill(c.settings, "", os.LookupEnv); err != nil {
		return nil, usageError{err}
	}
	if !strings.Contains(c.address, "://") {
		c.address = "http://" + c.address
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(c.address, "/")+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, usagef("--api %q: %w", c.address, err)
	}
	if c.tokenFile != "" {
		token, err := readToken(c.tokenFile)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	transport, err := c.transport()
	if err != nil {
		return nil, err
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if errors.As(err, new(x509.UnknownAuthorityError)) {
		return nil, usagef("the certificate of the hub is signed by nobody this machine trusts: name its authority with --ca FILE: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("no answer from the hub: %w (is \"cloudhub run\" running? name its --http address with --api)", err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	err = fmt.Errorf("the hub says: %s (%s)", strings.TrimSpace(string(text)), res.Status)
	if res.StatusCode == http.StatusBadRequest || res.StatusCode == http.StatusUnauthorized {
		return nil, usageError{err}
	}
	return nil, err
}

// transport trusts the authority of --ca alone, if there is one.
func (c *client) transport() (*http.Transport, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DisableKeepAlives = true // a command asks little, and ends
	if c.ca == "" {
		return t, nil
	}
	pem, err := os.ReadFile(c.ca)
	if err != nil {
		return nil, usagef("--ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, usagef("--ca %s: no PEM certificate in it", c.ca)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	return t, nil
}

func (c *client) getJSON(ctx context.Context, path string, query url.Values, into any) error {
	res, err := c.get(ctx, path, query)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(into); err != nil {
		return fmt.Errorf("read the hub's answer: %w", err)
	}
	return nil
}
